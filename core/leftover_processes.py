"""End every process of Flower that was started here: in whatever group, and also after a kill.

Flower's SuperLink, its executors and Ray make process groups of their own, so one signal to
one group does not reach them, and they outlive whoever started them. All inherit the
environment: those with our mark in it, and whatever these started, are ours. A process of its
own waits at a pipe for the one that started them to end, however that ends, and then ends the
others. It reads ``/proc`` and therefore works on Linux; elsewhere only the process group that
is given is reached.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "DAFNE_FEDERATED_PROCESSES"
_PATIENCE = 10.0  # seconds to end by itself
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class _Process:
    number: int
    parent: int
    started: str  # with the number it names a process even where numbers are used again
    marked: bool


@contextlib.contextmanager
def ended_afterwards(mark: str, group: int = 0, scratch: Path | None = None) -> Iterator[None]:
    """End what bears a mark when the block ends or this process is killed.

    Args:
        mark: Value of ``MARK`` in the environment of what was started here, and of nothing else.
        group: A process group that is ended, too; 0 for none.
        scratch: A folder that is removed, also after a kill.
    """
    command = [sys.executable, "-P", "-m", __name__, mark, str(group)]
    command += [] if scratch is None else [str(scratch)]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    watcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, cwd="/", start_new_session=True
    )
    try:
        yield
    finally:
        watcher.communicate()  # closes the pipe


def end_marked(mark: str, group: int) -> None:
    """End all processes whose environment holds ``mark``, and all that these started."""
    ours: dict[int, str] = {}
    for kind in (signal.SIGTERM, signal.SIGKILL):
        told: set[int] = set()
        end = time.monotonic() + _PATIENCE
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, kind)
        while time.monotonic() < end and (ours := _ours(mark, ours)):
            for number in ours.keys() - told:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(number, kind)
            told |= ours.keys()
            time.sleep(_POLL)


def _ours(mark: str, known: dict[int, str]) -> dict[int, str]:
    """Return start times of our living processes by number.

    A worker of Ray writes its title over its environment, so children are followed, too, and
    who was ours stays so after its parent has ended.
    """
    living = list(_living(f"{MARK}={mark}".encode()))
    ours = {p.number: p.started for p in living if p.marked or known.get(p.number) == p.started}
    ours.pop(os.getpid(), None)
    grown = True
    while grown:
        more = {p.number: p.started for p in living if p.parent in ours and p.number not in ours}
        grown = bool(more)
        ours |= more
    return ours


def _living(mark: bytes) -> Iterator[_Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # The name of the program, in brackets, may hold anything; proc(5) has the rest.
            state, parent, *rest = (folder / "stat").read_text().rpartition(")")[2].split()
            marked = mark in (folder / "environ").read_bytes().split(b"\0")
            if state != "Z":
                yield _Process(int(folder.name), int(parent), rest[17], marked)


def _main() -> None:
    mark, group, *scratch = sys.argv[1:]
    sys.stdin.buffer.read()  # ends when the other end of the pipe is closed, or its process gone
    end_marked(mark, int(group))
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main()
