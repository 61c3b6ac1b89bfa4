"""Programs that end are started again; all end with their supervisor, however that ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dafne_federated.core.errors import RunError
from dafne_federated.core.supervision import Program, stop, supervise, supervisor

ALONE = """
import sys
from pathlib import Path
from dafne_federated.core.supervision import supervise
supervise([], Path(sys.argv[1]) / "logs", Path(sys.argv[1]) / "lock")
"""
SUPERVISE = """
import os, sys
from pathlib import Path
from dafne_federated.core.supervision import Program, supervise
folder = Path(sys.argv[1])
shell = "echo $$ >> {0}/{1}.started; sleep 100 & echo $! >> {0}/children; wait"
programs = [
    Program(name, ("sh", "-c", shell.format(folder, name)), dict(os.environ))
    for name in ("one", "two")
]
supervise(programs, folder / "logs", folder / "lock")
"""


def alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(ready: Callable[[], object], patience: float = 20.0) -> None:
    end = time.monotonic() + patience
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def running(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-P", "-c", SUPERVISE, str(tmp_path)])
    wait_for(lambda: len(numbers(tmp_path / "children")) == 2)
    yield process
    process.kill()
    process.wait()


def test_a_program_that_ends_is_started_again(
    running: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    (first,) = numbers(tmp_path / "one.started")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(numbers(tmp_path / "one.started")) == 2)
    assert alive(numbers(tmp_path / "one.started")[1])
    assert len(numbers(tmp_path / "two.started")) == 1


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_everything_ends_with_its_supervisor(
    running: "subprocess.Popen[bytes]", tmp_path: Path, kind: signal.Signals
) -> None:
    names = ("one.started", "two.started", "children")
    ours = [number for name in names for number in numbers(tmp_path / name)]
    assert len(ours) == 4
    assert all(alive(number) for number in ours)
    running.send_signal(kind)
    assert running.wait(30) == (0 if kind != signal.SIGKILL else -kind)
    wait_for(lambda: not any(alive(number) for number in ours))


def test_there_is_one_supervisor_and_stop_finds_it(
    running: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    assert supervisor(tmp_path / "lock") == running.pid
    with pytest.raises(RunError, match="is started already"):
        supervise([], tmp_path / "logs", tmp_path / "lock")
    assert stop(tmp_path / "lock")
    assert running.wait(10) == 0
    assert supervisor(tmp_path / "lock") is None
    assert not stop(tmp_path / "lock")


def test_the_number_of_one_that_was_killed_is_never_told_to_end(tmp_path: Path) -> None:
    lock, command = tmp_path / "lock", [sys.executable, "-P", "-c", ALONE, str(tmp_path)]
    stranger = subprocess.Popen(["sleep", "100"])
    killed = subprocess.Popen(command)
    wait_for(lambda: supervisor(lock) == killed.pid)
    killed.kill()
    killed.wait()
    assert lock.read_text() == str(killed.pid)
    assert supervisor(lock) is None
    lock.write_text(str(stranger.pid))  # as if that number was given to somebody else
    assert not stop(lock)
    process = subprocess.Popen(command)
    seen = set()
    while (number := supervisor(lock)) != process.pid:
        seen.add(number)
    assert seen == {None}
    assert stop(lock)
    assert (process.wait(10), stranger.poll()) == (0, None)
    stranger.kill()
    stranger.wait()


def test_who_looks_keeps_nobody_from_starting(tmp_path: Path) -> None:
    lock, done = tmp_path / "lock", threading.Event()

    def look() -> None:
        while not done.is_set():
            supervisor(lock)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-P", "-c", ALONE, str(tmp_path)])
            wait_for(lambda process=process: supervisor(lock) == process.pid)
            assert stop(lock)
            assert process.wait(10) == 0
    finally:
        done.set()
        for looker in lookers:
            looker.join()


def test_a_second_start_prepares_nothing(
    running: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    done: list[str] = []
    with pytest.raises(RunError, match="is started already"):
        supervise([], tmp_path / "logs", tmp_path / "lock", lambda: done.append("prepared"))
    assert done == []


def test_logs_hold_what_programs_said_and_are_private(tmp_path: Path) -> None:
    program = Program("talker", ("sh", "-c", "echo said; exec sleep 50"), dict(os.environ))

    def end() -> None:
        log = tmp_path / "logs" / "talker.log"
        wait_for(lambda: log.exists() and log.read_text() == "said\n")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    supervise([program], tmp_path / "logs", tmp_path / "lock")
    thread.join()
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0
