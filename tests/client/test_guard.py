"""Flower's own program for sites unpacks no bundle that the guard did not look at."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supernode.runtime import run_clientapp

from dafne_federated.client.guard import REFUSALS, guarded, write_guard


def test_flower_unpacks_by_the_name_that_the_guard_replaces() -> None:
    source = inspect.getsource(run_clientapp)
    assert source.count("install_from_fab(") == 1
    assert callable(run_clientapp.install_from_fab)
    # A refusal becomes a fixed text: nothing of it reaches the server.
    assert "isinstance(ex, LoadClientAppError)" in source


def test_a_refused_bundle_is_not_unpacked_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unpacked: list[bytes] = []
    monkeypatch.setenv(REFUSALS, str(tmp_path / "refusals.log"))
    with pytest.raises(LoadClientAppError, match=r"^this site refuses the bundle$"):
        guarded(unpacked.append)(b"anything")
    assert unpacked == []
    noted = (tmp_path / "refusals.log").read_text()
    assert noted.endswith("refused: the bundle is damaged\n")
    assert capfd.readouterr().err == noted


def test_the_program_that_flower_starts_is_the_guard(tmp_path: Path) -> None:
    write_guard(tmp_path)
    done = subprocess.run(
        [tmp_path / "flwr-clientapp", "--help"], capture_output=True, text=True, check=False
    )
    assert "Run a Flower ClientApp" in done.stdout, done.stderr
    assert sys.executable in (tmp_path / "flwr-clientapp").read_text()
