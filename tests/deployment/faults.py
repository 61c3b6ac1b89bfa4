"""What can go wrong in a federation, each as one function that does it to a deployment.

A fault that lasts mends itself after a while, as people, systemd or the network would; what it
left behind is put right by ``Stage.mend`` when the run is over.
"""

import os
import random
import shutil
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.supervision import supervisor
from tests.deployment.bad_network import BadNetwork
from tests.deployment.deployed import NAMES, Deployment, descendants, wait_for

OUTAGE = 30.0  # seconds
RESTART = 5.0  # seconds after which systemd would start a supervisor again
_PATIENCE = 300.0  # seconds that a program to be killed is waited for


@dataclass
class Stage:
    """Where faults happen.

    Attributes:
        deployment: Coordinator and sites.
        network: What lies between them.
        run: The run that has to bear it.
        begin: What a person types to begin it, after the name of the program.
        command: The command that follows it; None before it is typed.
        mounted: Whether the folders of the coordinator and of the last site are small disks.
        mends: What is to be put right when the run is over.
        missed: Faults that turned out not to have happened, once they were put right.
    """

    deployment: Deployment
    network: BadNetwork
    run: RunFolder
    begin: Sequence[object] = ()
    command: "subprocess.Popen[bytes] | None" = None
    mounted: bool = False
    mends: list[Callable[[], None]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    starting: threading.RLock = field(default_factory=threading.RLock)

    @property
    def over(self) -> bool:
        """Whether nobody follows the run any more."""
        return self.command is not None and self.command.poll() is not None

    def kill(self, lock: Path, *programs: str) -> str:
        """Kill a program below a supervisor as soon as there is one; return what was done."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and not self.over:
            number = supervisor(lock)
            found = descendants(number) if number else {}
            chosen = [n for n, command in found.items() if _runs(command, programs)]
            if chosen:
                with suppress(ProcessLookupError):
                    os.kill(min(chosen), signal.SIGKILL)
                    return f"killed {programs[0]}"
            time.sleep(0.05)
        return f"found no {programs[0]} to kill"

    def resume(self) -> None:
        """Follow the run again, or begin it, as a person would who types the command."""
        server, name = self.deployment.server.path, self.run.path.name
        again = ("server", "resume", server, name, "--quiet")
        made = (self.run.path / "run.json").exists()
        self.command = self.deployment.started(*(again if made else self.begin))

    def mend(self) -> None:
        """Put right what faults left behind."""
        self.network.heal()
        while self.mends:
            self.mends.pop()()


Fault = Callable[[Stage, random.Random], str]


def _runs(command: str, programs: tuple[str, ...]) -> bool:
    return any(word.endswith(programs) for word in command.split()[:5])


def kill_server_app(stage: Stage, _random: random.Random) -> str:
    return stage.kill(stage.deployment.server.lock, "flwr-serverapp")


def kill_superlink(stage: Stage, _random: random.Random) -> str:
    return stage.kill(stage.deployment.server.lock, "flower-superlink")


def kill_run_starter(stage: Stage, _random: random.Random) -> str:
    return stage.kill(stage.deployment.server.lock, "flower-superexec")


def kill_gateway(stage: Stage, _random: random.Random) -> str:
    return stage.kill(stage.deployment.server.lock, "server.gateway")


def kill_node(stage: Stage, chance: random.Random) -> str:
    return stage.kill(_some_site(stage, chance), "client.node")


def kill_work_starter(stage: Stage, chance: random.Random) -> str:
    return stage.kill(_some_site(stage, chance), "client.work_starter")


def kill_client_app(stage: Stage, chance: random.Random) -> str:
    return stage.kill(_some_site(stage, chance), "client.guard")


def kill_server_supervisor(stage: Stage, _random: random.Random) -> str:
    with stage.starting:
        _kill_supervisor(stage, stage.deployment.server.lock)
        stage.deployment.start_server()
    return f"killed 'server start', started again after {RESTART:g} s"


def kill_site_supervisor(stage: Stage, chance: random.Random) -> str:
    name = chance.choice(NAMES)
    with stage.starting:
        _kill_supervisor(stage, stage.deployment.sites[name].lock)
        stage.deployment.start_site(name)
    return f"killed 'site start' of {name}, started again after {RESTART:g} s"


def kill_follower(stage: Stage, chance: random.Random) -> str:
    if stage.over or stage.command is None:
        return "the run was over"
    stage.command.kill()
    time.sleep(chance.uniform(0, 10))
    stage.resume()
    return "killed 'server run', then 'server resume'"


def slow_network(stage: Stage, _random: random.Random) -> str:
    stage.network.rate = 64_000
    return "64 kB/s to the end"


def resetting_network(stage: Stage, _random: random.Random) -> str:
    stage.network.reset = 0.01
    return "a connection is reset at 1 % of its pieces of 8 KiB, to the end"


def outage(stage: Stage, chance: random.Random) -> str:
    stage.network.cut = True
    if router := chance.random() < 0.5:
        stage.network.reset_all()
    time.sleep(OUTAGE)
    stage.network.cut = False
    return f"nothing passed for {OUTAGE:g} s{', and all connections were reset' * router}"


def full_disk_at_a_site(stage: Stage, _random: random.Random) -> str:
    return _fill(stage, stage.deployment.sites[NAMES[-1]].path)


def full_disk_at_the_coordinator(stage: Stage, _random: random.Random) -> str:
    return _fill(stage, stage.deployment.server.path)


def late_site(stage: Stage, chance: random.Random) -> str:
    name = chance.choice(NAMES)
    stage.deployment.command("site", "stop", stage.deployment.sites[name].path)
    coming = threading.Timer(OUTAGE, lambda: stage.deployment.start_site(name))
    coming.start()
    stage.mends.append(coming.join)
    return f"{name} was stopped and came {OUTAGE:g} s after the run began"


def leaving_site(stage: Stage, chance: random.Random) -> str:
    name = chance.choice(NAMES)
    with stage.starting:
        stage.deployment.command("site", "stop", stage.deployment.sites[name].path)
        time.sleep(OUTAGE)
        stage.deployment.start_site(name)
    return f"{name} left for {OUTAGE:g} s"


def answer_twice(stage: Stage, chance: random.Random) -> str:
    return _other_program(
        stage,
        chance,
        "answers twice",
        """
        import flwr.supernode.runtime.run_clientapp as runtime
        once = runtime.push_message
        def twice(*given):
            once(*given)
            happened()
            once(*given)
        runtime.push_message = twice
        """,
    )


def answer_another_round(stage: Stage, chance: random.Random) -> str:
    return _other_program(
        stage,
        chance,
        "answers another round, once",
        """
        import dafne_federated.client.app as app
        right = app._round_reply
        def wrong(request, *given):
            if request.round == 2 and given[1] == "ok" and not marker.exists():
                happened()
                request = request.model_copy(update={"round": 1})
            return right(request, *given)
        app._round_reply = wrong
        """,
    )


def wrong_clock(stage: Stage, chance: random.Random) -> str:
    name = chance.choice(NAMES)
    site, minutes = stage.deployment.sites[name], chance.choice((-5, 5))
    off = {
        "LD_PRELOAD": str(clock_library(stage.deployment.path)),
        "CLOCK_IS_OFF_BY": str(60 * minutes),
    }
    with stage.starting:
        stage.deployment.command("site", "stop", site.path)
        stage.deployment.start_site(name, off)
        time.sleep(OUTAGE)
        stage.deployment.command("site", "stop", site.path)
        stage.deployment.start_site(name)
    return f"{name} was started with a clock {minutes:+d} minutes off, and right {OUTAGE:g} s later"


def second_run(stage: Stage, _random: random.Random) -> str:
    wait_for(lambda: stage.over or any(stage.run.events()), _PATIENCE)
    if stage.over:
        return "the run was over"
    server, base = stage.deployment.server.path, stage.run.base
    other = stage.deployment.command(
        *("server", "run", server, "--base", base, "--name", f"{stage.run.path.name}-again"),
        *("--settings", "settings.toml", "--quiet"),
    )
    words = other.stderr.strip().splitlines() or ["(nothing)"]
    return f"a second run ended with {other.returncode}: {words[-1][-120:]}"


FAULTS: dict[str, Fault] = {
    "kill server app": kill_server_app,
    "kill superlink": kill_superlink,
    "kill run starter": kill_run_starter,
    "kill gateway": kill_gateway,
    "kill node": kill_node,
    "kill work starter": kill_work_starter,
    "kill client app": kill_client_app,
    "kill server supervisor": kill_server_supervisor,
    "kill site supervisor": kill_site_supervisor,
    "kill follower": kill_follower,
    "slow network": slow_network,
    "resets": resetting_network,
    "outage": outage,
    "full disk at a site": full_disk_at_a_site,
    "full disk at the coordinator": full_disk_at_the_coordinator,
    "late site": late_site,
    "leaving site": leaving_site,
    "answer twice": answer_twice,
    "answer to another round": answer_another_round,
    "wrong clock": wrong_clock,
    "second run": second_run,
}
AT_THE_START = ("late site", "answer twice", "answer to another round")  # of the run


def clock_library(folder: Path) -> Path:
    """Compile what shifts the clock of a program by ``CLOCK_IS_OFF_BY`` seconds.

    Real time of this program alone: a time namespace of Linux shifts only the other clocks.
    """
    library, source = folder / "clock.so", folder / "clock.c"
    if not library.exists():
        source.write_text(
            textwrap.dedent("""\
            #define _GNU_SOURCE
            #include <stdlib.h>
            #include <sys/syscall.h>
            #include <sys/time.h>
            #include <time.h>
            #include <unistd.h>
            static long off(void) {
                const char *by = getenv("CLOCK_IS_OFF_BY");
                return by ? atol(by) : 0;
            }
            int clock_gettime(clockid_t clock, struct timespec *now) {
                int status = syscall(SYS_clock_gettime, clock, now);
                if (status == 0 && clock == CLOCK_REALTIME) now->tv_sec += off();
                return status;
            }
            int gettimeofday(struct timeval *restrict now, void *restrict zone) {
                int status = syscall(SYS_gettimeofday, now, zone);
                if (status == 0) now->tv_sec += off();
                return status;
            }
            time_t time(time_t *where) {
                struct timespec now;
                clock_gettime(CLOCK_REALTIME, &now);
                if (where) *where = now.tv_sec;
                return now.tv_sec;
            }
            """)
        )
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True
        )
    return library


def mount_small_disk(folder: Path, size: int) -> bool:
    """Make a folder a disk of ``size`` MiB in memory; return whether root may do that here."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}m,mode=700", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _some_site(stage: Stage, chance: random.Random) -> Path:
    return stage.deployment.sites[chance.choice(NAMES)].lock


def _kill_supervisor(stage: Stage, lock: Path) -> None:
    number = supervisor(lock)
    if number is not None:
        os.kill(number, signal.SIGKILL)
    stage.deployment.running[lock].wait()
    time.sleep(RESTART)
    wait_for(lambda: supervisor(lock) is None)


def _fill(stage: Stage, folder: Path) -> str:
    if not stage.mounted:
        return "not done: needs root for a small disk"
    filler = folder / "filler"
    stage.mends.append(lambda: filler.unlink(missing_ok=True))
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    left = shutil.disk_usage(folder).free
    time.sleep(OUTAGE)
    filler.unlink()
    return f"{left} bytes were left for {OUTAGE:g} s"


def _other_program(stage: Stage, chance: random.Random, what: str, changes: str) -> str:
    """Let the program that answers at a site be another one, until the run is over.

    Python runs a ``sitecustomize`` that it finds, and before the program itself. Of all that
    runs at the site, only the guard is changed. ``changes`` calls ``happened()`` as it acts.
    """
    name = chance.choice(NAMES)
    folder = stage.deployment.python(name)
    marker, program = folder / "happened", folder / "sitecustomize.py"
    head = f"""
        import pathlib
        marker = pathlib.Path({str(marker)!r})
        happened = marker.touch
        """
    changed = textwrap.indent(textwrap.dedent(head + changes).strip(), "    ")
    code = f'import sys\nif "dafne_federated.client.guard" in sys.orig_argv:\n{changed}\n'
    marker.unlink(missing_ok=True)

    def mend() -> None:
        program.unlink()
        if not marker.exists():
            stage.missed.append(f"{name} {what}")

    stage.mends.append(mend)
    program.write_text(code, encoding="utf-8")
    return f"{name} {what}"
