"""What ran on this machine, since when, until when, and how much memory it took at most.

Looks into ``/proc`` a few times a second: the end of a process, and the last growth of its
memory, may be missed by one look.
"""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_LOOK = 0.1  # seconds
_TICK = os.sysconf("SC_CLK_TCK")
# What a command line holds, and what people call the program.
_ROLES = {
    "leftover_processes": "",
    "multiprocessing": "",
    "server start": "coordinator: supervisor",
    "flower-superlink": "coordinator: SuperLink",
    "server.gateway": "coordinator: gateway",
    "flwr-serverapp": "coordinator: ServerApp (the rounds)",
    "server run": "coordinator: command server run",
    "site start": "site: supervisor",
    "client.node": "site: SuperNode",
    "client.work_starter": "site: SuperExec",
    "flwr-clientapp": "site: ClientApp (one message)",
    "client.guard": "site: ClientApp (one message)",
}


@dataclass
class Seen:
    """One process.

    Attributes:
        role: What it is; empty for helpers.
        parent: Number of the process that started it.
        started: Seconds since 1970, as ``ended``.
        ended: When it was last seen.
        peak: Most resident memory, MiB.
        processor: Processor seconds.
    """

    role: str
    parent: int
    started: float
    ended: float
    peak: float
    processor: float


class Watch:
    """Watches this process's descendants until it is stopped."""

    def __init__(self):
        self.seen = {}
        self._boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._thread.join()

    def under(self, parent):
        """Return the processes that ``parent`` started, and those that these started."""
        found, more = {}, {parent}
        while more := {n for n, one in self.seen.items() if one.parent in more} - found.keys():
            found |= {n: self.seen[n] for n in more}
        return found

    def _run(self):
        while not self._stopped.wait(_LOOK):
            now = time.time()
            for path in Path("/proc").glob("[0-9]*"):
                number = int(path.name)
                try:
                    fields = (path / "stat").read_text().rpartition(")")[2].split()
                    parent = int(fields[1])
                    known = self.seen.get(number)
                    if known is None and parent != os.getpid() and parent not in self.seen:
                        continue
                    if fields[0] == "Z":
                        continue
                    words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    status = (path / "status").read_text()
                except (OSError, ValueError):
                    continue
                if "VmHWM:" not in status:  # it is just ending
                    continue
                peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
                spent = (int(fields[11]) + int(fields[12])) / _TICK
                started = self._boot + int(fields[19]) / _TICK
                if known is None:
                    known = Seen("", parent, started, now, peak, spent)
                    self.seen[number] = known
                known.role = _role(words)  # one process may become another program
                known.ended, known.processor = now, spent
                known.peak = max(known.peak, peak)


def _role(words):
    named = (name for part, name in _ROLES.items() if part in words)
    if "flower-superexec" in words:
        return "site: SuperExec" if "--insecure" in words else "coordinator: SuperExec"
    return next(named, "")
