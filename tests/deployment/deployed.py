"""A coordinator and its sites on this machine, as processes, with TLS and keys.

For tests, and for ``benchmarks/faults.py``.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dafne_federated.client.deployment_folder import SiteFolder
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.supervision import supervisor
from dafne_federated.core.volumes import Case, write_nifti_pair
from dafne_federated.server.deployment_folder import ServerFolder
from tests.deployment.bad_network import BadNetwork

SETTINGS = """\
rounds = 2
epochs = 3
threads = 2
device = "cpu"
margin = 0.2
min-persons = 1
max-rank = 8
deadline = 300
"""
NAMES = ("clinic", "hospital")


def processes() -> dict[int, tuple[int, str]]:
    """Return parent and command of each living process by its number."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    return {int(r[0]): (int(r[1]), r[3]) for r in rows if not r[2].startswith("Z")}


def descendants(number: int) -> dict[int, str]:
    """Return the commands of all that a process started, and what these started."""
    listed, found = processes(), {number}
    while more := {own for own, (parent, _) in listed.items() if parent in found} - found:
        found |= more
    return {own: listed[own][1] for own in found - {number} if own in listed}


def wait_for(ready: Callable[[], Any], patience: float = 180.0) -> Any:
    """Return what ``ready`` returns as soon as it is true; fail after ``patience`` seconds."""
    end = time.monotonic() + patience
    while not (found := ready()):
        assert time.monotonic() < end, f"not within {patience} s: {ready}"
        time.sleep(0.3)
    return found


_FIRST = iter(range(20_000 + 4 * (os.getpid() % 2_000), 32_000, 4))  # none is given twice


def free_ports() -> int:
    """Return the first of four neighbouring ports that nobody listens on."""
    for first in _FIRST:
        sockets = [socket.socket() for _ in range(4)]
        try:
            for offset, probe in enumerate(sockets):
                probe.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
        return first
    raise AssertionError


@dataclass
class Deployment:
    """Everything on one machine; commands are those that people type."""

    path: Path
    environment: dict[str, str]
    server: ServerFolder
    sites: dict[str, SiteFolder]
    port: int
    door: int  # where sites find the coordinator: its port, or that of something in between
    running: dict[Path, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def command(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self.program, *map(str, arguments)],
            env=self.environment, cwd=self.path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def done(self, *arguments: object) -> str:
        found = self.command(*arguments)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    def started(
        self, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        with (self.path / "output.log").open("ab") as output:
            return subprocess.Popen(
                [*self.program, *map(str, arguments)],
                env={**self.environment, **(environment or {})},
                cwd=self.path, stdout=output, stderr=output,
            )  # fmt: skip

    def told(self) -> str:
        """Return what commands and the run's program said last, for whoever reads of a failure."""
        logs = (self.path / "output.log", self.server.logs / "runs.log")
        return "\n".join(f"{log}:\n{log.read_text()[-4000:]}" for log in logs)

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.server.run_path(name))

    def make_site(self, name: str, data: Path, authority: Path | None = None) -> SiteFolder:
        self.done(
            *("site", "init", self.path / name, "--name", name),
            *("--coordinator", f"localhost:{self.door}", "--data", data),
            *("--ca", authority or self.server.authority, "--local-port", free_ports()),
        )
        site = SiteFolder(self.path / name)
        text = site.settings_file.read_text()
        text = text.replace("threads = 0", "threads = 2").replace('"auto"', '"cpu"')
        site.settings_file.write_text(text)
        return site

    def start_server(self) -> None:
        self.running[self.server.lock] = self.started("server", "start", self.server.path)

    def start_site(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        site = self.sites[name]
        found = (str(self.python(name)), self.environment.get("PYTHONPATH", ""))
        given = {"PYTHONPATH": os.pathsep.join(filter(None, found)), **(environment or {})}
        self.running[site.lock] = self.started("site", "start", site.path, environment=given)

    def python(self, name: str) -> Path:
        """Return a folder where the Python of this site looks first; empty but for faults."""
        folder = self.path / f"python-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def online(self) -> int:
        return self.command("server", "sites", self.server.path).stdout.count(" online ")

    @property
    def program(self) -> list[str]:
        return [sys.executable, "-P", "-m", "dafne_federated.cli.app"]


@contextmanager
def deployed(
    path: Path,
    base: Path,
    make_case: Callable[..., Case],
    settings: str = SETTINGS,
    network: BadNetwork | None = None,
) -> Iterator[Deployment]:
    """Run a coordinator and its registered sites; nothing of it stays behind.

    Args:
        path: Where.
        base: A `.model` that is approved at the coordinator.
        make_case: Draws a case from a name and a seed.
        settings: TOML of the runs.
        network: What lies between sites and coordinator, if anything; it is told where to lead.
    """
    environment = {
        **os.environ,
        "DAFNE_FEDERATED_HOME": str(path / "home"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    port = free_ports()
    server = ServerFolder(path / "coordinator")
    made = Deployment(path, environment, server, {}, port, network.port if network else port)
    if network:
        network.to = port
    (path / "settings.toml").write_text(settings)
    for number, name in enumerate(NAMES):
        write_data(path / f"data-{name}", name, 0.45 - 0.1 * number, make_case)
    made.done(
        *("server", "init", server.path, "--host", "localhost", "--listen", "127.0.0.1"),
        *("--port", port, "--local-port", port + 1),
    )
    try:
        made.start_server()
        for name in NAMES:
            made.sites[name] = made.make_site(name, path / f"data-{name}")
        wait_for(lambda: made.command("server", "status", server.path).returncode == 0)
        for name, site in made.sites.items():
            made.done("server", "register", server.path, name, site.request_file(name))
            made.start_site(name)
        wait_for(lambda: made.online() == len(NAMES))
        made.done("approve", base, "--yes")
        yield made
    finally:
        above = [number for lock in made.running if (number := supervisor(lock))]
        seen = {one for number in above for one in (number, *descendants(number))}
        for folder in (site.path for site in made.sites.values()):
            made.command("site", "stop", folder)
        made.command("server", "stop", server.path)
        for process in made.running.values():
            process.kill()
            process.wait()
    left = {n: command for n, (_, command) in processes().items() if n in seen}
    assert left == {}
    assert len(seen) > 9  # three supervisors with two or three programs and a watcher each


def write_data(path: Path, site: str, strength: float, make_case: Callable[..., Case]) -> None:
    """Write three persons whose contrast differs by site."""
    for number in range(3):
        case = make_case(f"{site}-{number}", 100 + number)
        image = (100 + (case.image - 100) * strength).astype(np.float32)
        files = (path / f"{kind}/{case.name}.nii.gz" for kind in ("images", "labels"))
        write_nifti_pair(replace(case, image=image), *files, {1: "bright", 2: "dark"})
    (path / "dataset.json").write_text(
        '{"name": "Squares", "labels": {"1": "bright", "2": "dark"}}'
    )
