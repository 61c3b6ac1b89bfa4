"""A site starts the guard of its installed package, by its path, and nothing in place of it."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec

from dafne_federated.client import work_starter

MESSAGE = """\
import sys
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from dafne_federated.client.work_starter import GUARD, GuardedStart
if "--remove" in sys.argv:
    GUARD.unlink()
spec = ExecutionSpec(TaskType(sys.argv[1]), "127.0.0.1:1", "t", True, None, False, None, False, 1)
starter = GuardedStart()
print("started" if starter.launch(spec).message is None else "nothing started")
for process in starter._running:
    print(process.args[1:4])
    process.kill()
    process.wait()
starter.reconcile()
"""
Start = Callable[..., "tuple[str, str]"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return the folder of a copy of what a site has installed."""
    installed = work_starter.GUARD.parent.parent
    for folder in ("client", "core"):
        shutil.copytree(installed / folder, tmp_path / "copy/dafne_federated" / folder)
    return tmp_path / "copy/dafne_federated"


@pytest.fixture
def start(package: Path, tmp_path: Path) -> Start:
    """Return what starts a task from that copy; the path has Flower's own program, which runs."""
    theirs = tmp_path / "programs/flwr-clientapp"
    theirs.parent.mkdir()
    theirs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'it-ran'}\n")
    theirs.chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": str(package.parent),
        "PATH": f"{theirs.parent}{os.pathsep}{os.environ['PATH']}",
        "DAFNE_FEDERATED_REFUSALS": str(tmp_path / "refusals.log"),
    }

    def started(kind: TaskType, *more: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", MESSAGE, kind.value, *more],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        noted = tmp_path / "refusals.log"
        return done.stdout.strip(), noted.read_text() if noted.exists() else done.stderr

    return started


def test_flower_asks_for_what_starts_programs_by_the_name_that_is_replaced() -> None:
    source = inspect.getsource(run_superexec.run_superexec)
    assert source.count("get_executor(") == 1
    assert "executor.reconcile()" in source
    assert "executor.launch" not in source  # by the plug-in, which is given the executor
    assert "executor=executor" in source


def test_the_guard_is_started_and_not_what_the_path_has(start: Start, tmp_path: Path) -> None:
    said, noted = start(TaskType.CLIENT_APP)
    assert said == "started\n['-P', '-m', 'dafne_federated.client.guard']"
    assert "a program ended with status -9" in noted
    assert not (tmp_path / "it-ran").exists()


def test_without_the_guard_nothing_is_started(start: Start, package: Path, tmp_path: Path) -> None:
    said, noted = start(TaskType.CLIENT_APP, "--remove")  # while the site runs
    assert not (package / "client/guard.py").exists()
    assert said == "nothing started"
    assert "is missing; install this package again" in noted
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("kind", sorted(set(TaskType) - {TaskType.CLIENT_APP}))
def test_no_other_work_is_done(kind: TaskType, start: Start, tmp_path: Path) -> None:
    said, noted = start(kind)
    assert said == "nothing started"
    assert f"a site has no work of the kind '{kind.value}'" in noted
    assert not (tmp_path / "it-ran").exists()
