"""Keep programs running: one that ends is started again, and all end together.

Whoever supervises holds a lock, so that a second start is refused, and a lock on a file with its
process number, so that a stop finds whom to tell. That file appears with its number written and
its lock held, so that the number of one that was killed is never taken for that of the next; and
who looks at it touches nothing that a start needs. Whatever the programs started themselves ends
with them, also when the supervisor is killed.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import private_folder
from dafne_federated.core.leftover_processes import MARK, ended_afterwards

log = logging.getLogger(__name__)

_POLL = 0.3  # seconds between two looks
_LONGEST_PAUSE = 10.0  # seconds before a program that keeps ending is started again
_STEADY = 60.0  # seconds after which a program counts as started well
_LARGEST_LOG = 50 * 2**20  # bytes; then the log is put aside, and the one before it removed


@dataclass(frozen=True)
class Program:
    """One program that is to run all the time.

    Attributes:
        name: For people, and of its log.
        command: What is started.
        environment: Its whole environment.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def supervise(
    programs: Sequence[Program],
    folder: Path,
    lock: Path,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Run programs until this process is told to end (SIGTERM, SIGINT or SIGHUP).

    Args:
        programs: All of them.
        folder: Where their logs go, ``<name>.log``; private.
        lock: The file with the number of the one supervisor.
        prepare: What is done before they start, by nobody else at the same time.

    Raises:
        RunError: Another process supervises them.
    """
    mark = secrets.token_hex(16)
    private_folder(folder)
    with _told_to_end() as ended, _only_one(lock), ended_afterwards(mark):  # heard once it is seen
        prepare()
        kept = [_Kept(program, folder / f"{program.name}.log", mark) for program in programs]
        while not ended.is_set():
            for one in kept:
                one.look()
            ended.wait(_POLL)
    for one in kept:
        one.reap()


def supervisor(lock: Path) -> int | None:
    """Return the number of the process that supervises, or None."""
    try:
        with lock.open("rb") as file:
            if _locked(file.fileno(), fcntl.LOCK_SH):  # its process is gone
                return None
            return int(file.read() or b"0") or None
    except (OSError, ValueError):
        return None


def stop(lock: Path, patience: float = 60.0) -> bool:
    """Tell the supervisor to end and wait for it; return whether there was one.

    Raises:
        RunError: It did not end in ``patience`` seconds.
    """
    number = supervisor(lock)
    if number is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGTERM)
    end = time.monotonic() + patience
    while supervisor(lock) is not None:
        if time.monotonic() > end:
            msg = f"process {number} did not end within {patience:g} s"
            raise RunError(msg)
        time.sleep(_POLL)
    return True


@dataclass
class _Kept:
    """A program while it is supervised."""

    program: Program
    log: Path
    mark: str
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    pause: float = 1.0
    next_start: float = 0.0

    def look(self) -> None:
        """Start the program if it does not run and its pause is over."""
        now = time.monotonic()
        if self.process is not None and (status := self.process.poll()) is not None:
            self.process = None
            if now - self.started > _STEADY:
                self.pause = 1.0
            self.next_start = now + self.pause
            log.warning(
                "%s ended with status %d and starts again in %g s; see %s",
                *(self.program.name, status, self.pause, self.log),
            )
            self.pause = min(self.pause * 2, _LONGEST_PAUSE)
        if self.process is None and now >= self.next_start:
            self.start(now)

    def start(self, now: float) -> None:
        """Start the program in a session of its own, away from the terminal's signals."""
        self.started, self.next_start = now, now + self.pause
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > _LARGEST_LOG:
                os.replace(self.log, self.log.with_suffix(".log.1"))
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.program.command,
                env={**self.program.environment, MARK: self.mark},
                cwd="/",  # Python looks for modules where it is started
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=0o077,
            )

    def reap(self) -> None:
        """Take note of the end of a process that was ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.with_name(f"{lock.name}.start").open("ab") as door:
        if not _locked(door.fileno(), fcntl.LOCK_EX):
            msg = f"{str(lock.parent)!r} is started already"
            raise RunError(msg)
        handle, temporary = tempfile.mkstemp(dir=lock.parent, prefix=f".{lock.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(str(os.getpid()).encode())
            file.flush()
            _locked(handle, fcntl.LOCK_EX)
            os.replace(temporary, lock)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)


def _locked(handle: int, kind: int) -> bool:
    """Take the lock of a file that is open, and return whether it was free."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """Give an event that is set when somebody wants this process to end."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {kind: signal.signal(kind, end) for kind in kinds}
    try:
        yield ended
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
