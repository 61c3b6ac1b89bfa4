"""A site looks at every bundle, unpacks none, and runs the program that is installed."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supernode.runtime import run_clientapp

from dafne_federated.client.app import app
from dafne_federated.client.guard import (
    PROGRAM,
    REFUSALS,
    installed_loader,
    look_at_bundle,
    require_guard,
    write_guard,
)
from dafne_federated.core.errors import RunError


def test_flower_unpacks_and_loads_by_the_names_that_the_guard_replaces() -> None:
    source = inspect.getsource(run_clientapp.run_clientapp)
    for name in ("install_from_fab", "get_load_client_app_fn"):
        assert source.count(f"{name}(") == 1
        assert callable(getattr(run_clientapp, name))
    assert source.index("install_from_fab(") < source.index("get_load_client_app_fn(")
    # A refusal becomes a fixed text: nothing of it reaches the server.
    assert "isinstance(ex, LoadClientAppError)" in source


def test_what_runs_is_the_installed_program_whatever_is_named() -> None:
    load = installed_loader(default_app_ref="os:system", app_path="/tmp", multi_app=True)
    assert load("other/app", "1.0", "0" * 64) is app


def test_a_refused_bundle_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(REFUSALS, str(tmp_path / "refusals.log"))
    with pytest.raises(LoadClientAppError, match=r"^this site refuses the bundle$"):
        look_at_bundle(b"anything", skip_prompt=True)
    noted = (tmp_path / "refusals.log").read_text()
    assert noted.endswith("refused: the bundle is damaged\n")
    assert capfd.readouterr().err == noted


def test_without_a_guard_that_can_be_executed_nothing_starts(tmp_path: Path) -> None:
    other = tmp_path / "flowers"
    other.mkdir()
    theirs = other / PROGRAM
    theirs.write_text("#!/bin/sh\n")
    theirs.chmod(0o755)
    (tmp_path / "ours").mkdir()
    guard = write_guard(tmp_path / "ours")
    search = f"{guard.parent}{os.pathsep}{other}"
    assert guard.stat().st_mode & 0o777 == 0o700
    require_guard(guard, search)
    guard.chmod(0o600)  # as on a disk that is mounted noexec
    with pytest.raises(RunError, match=f"expected to be the program .* got {theirs}"):
        require_guard(guard, search)
    guard.unlink()
    with pytest.raises(RunError, match="expected to be the program"):
        require_guard(guard, search)


def test_the_program_that_flower_starts_is_the_guard(tmp_path: Path) -> None:
    write_guard(tmp_path)
    done = subprocess.run(
        [tmp_path / "flwr-clientapp", "--help"], capture_output=True, text=True, check=False
    )
    assert "Run a Flower ClientApp" in done.stdout, done.stderr
    assert sys.executable in (tmp_path / "flwr-clientapp").read_text()
