"""A site looks at every bundle, unpacks none, and runs the program that is installed."""

import inspect
from pathlib import Path

import pytest
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supernode.runtime import run_clientapp

from dafne_federated.client.app import app
from dafne_federated.client.guard import REPLACED, installed_loader, look_at_bundle
from dafne_federated.client.refusals import REFUSALS


def test_flower_unpacks_and_loads_by_the_names_that_the_guard_replaces() -> None:
    source = inspect.getsource(run_clientapp.run_clientapp)
    for name in REPLACED:
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
