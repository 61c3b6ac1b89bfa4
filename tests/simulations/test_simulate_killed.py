"""A simulation that is killed goes on in the same bits, and nothing of it stays behind."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402


@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_simulation_goes_on_and_ends_in_the_same_bits(
    done: RunFolder, trained: Any, squares_folder: Path, tmp_path: Path, moment: int
) -> None:
    Approvals().add(read_model(trained.path), "test")
    run = tmp_path / "run"
    (tmp_path / "settings.toml").write_text(
        'rounds = 2\nepochs = 3\nthreads = 2\ndevice = "cpu"\nmargin = 0.2\nmax-rank = 8\n'
        "min-persons = 1\n"
    )
    command = [
        *(sys.executable, "-m", "dafne_federated.cli.app", "simulate", str(squares_folder)),
        *("--base", str(trained.path), "--run", str(run), "--no-local-only", "--quiet"),
        *("--settings", str(tmp_path / "settings.toml")),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if len(RunFolder(run).rounds()) >= moment:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(RunFolder(run).rounds()) >= moment
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "largest difference between the released file and the adapted network" in (
        finished.stdout
    )
    assert RunFolder(run).result().content_digest == done.result().content_digest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: Ray makes sockets in it, whose paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as path:
        yield Path(path)


def descendants(process: int) -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = {process}
    while more := {own for own, parent in pairs if parent in found} - found:
        found |= more
    return found - {process}


def alive(processes: set[int]) -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return processes & {int(number) for number, state in pairs if not state.startswith("Z")}


@pytest.mark.simulation
@pytest.mark.parametrize("parallel", [1, 2])
def test_ray_gives_the_same_result_and_leaves_nothing_running(
    done: RunFolder,
    trained: Any,
    squares_folder: Path,
    tmp_path: Path,
    scratch: Path,
    parallel: int,
) -> None:
    pytest.importorskip("ray")
    with ray_simulation(trained, squares_folder, tmp_path, scratch, parallel) as process:
        seen: set[int] = set()
        while process.poll() is None:
            seen |= descendants(process.pid)
            time.sleep(0.3)
        assert process.returncode == 0
    assert RunFolder(tmp_path / "run").result().content_digest == done.result().content_digest
    assert len(seen) > 5  # SuperLink, executors, Ray and its workers
    assert alive(seen) == set()


@pytest.mark.simulation
def test_after_a_kill_of_the_simulation_ray_and_flower_end(
    trained: Any, squares_folder: Path, tmp_path: Path, scratch: Path
) -> None:
    pytest.importorskip("ray")
    with ray_simulation(trained, squares_folder, tmp_path, scratch) as process:
        seen: set[int] = set()
        while process.poll() is None and not RunFolder(tmp_path / "run").rounds():
            seen |= descendants(process.pid)
            time.sleep(0.3)
        seen |= descendants(process.pid)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert len(seen) > 5
    end = time.monotonic() + 40
    while alive(seen) and time.monotonic() < end:
        time.sleep(0.5)
    assert alive(seen) == set()
    assert not list(scratch.glob("dafne-federated-ray-*"))


@contextlib.contextmanager
def ray_simulation(
    trained: Any, data: Path, folder: Path, scratch: Path, parallel: int = 1
) -> Iterator["subprocess.Popen[bytes]"]:
    Approvals().add(read_model(trained.path), "test")
    command = [
        *(sys.executable, "-m", "dafne_federated.cli.app", "simulate", str(data), "--quiet"),
        *("--base", str(trained.path), "--run", str(folder / "run"), "--no-local-only"),
        *("--engine", "ray", "--rounds", "2", "--epochs", "3", "--threads", "2"),
        *(
            "--device",
            "cpu",
            "--margin",
            "0.2",
            "--min-persons",
            "1",
            "--max-rank",
            "8",
            "--parallel",
            str(parallel),
        ),
    ]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
