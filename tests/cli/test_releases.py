"""Releases are listed, verified, and gone back to, here and on a Dafne server; worse ones never."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dafne_stand_in import KEY, START, StandIn, digest
from typer.testing import CliRunner

from dafne_federated.cli.app import app
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.signed_release import MANIFEST, SIGNATURE
from dafne_federated.server.continuation import Continuation, keep_continuation
from dafne_federated.server.deployment_folder import ServerFolder, ServerSettings, make_server
from dafne_federated.server.generation import GenerationInfo, make_generation
from tests.cli.test_models import BASE, OTHER, STATE, finished_run


@pytest.fixture
def coordinator(tmp_path: Path) -> ServerFolder:
    """A coordinator with two releases and a run that released nothing."""
    folder = make_server(tmp_path / "coordinator", ServerSettings(hosts=("localhost",)))
    finished_run(folder.runs / "first", created=START + 1)
    finished_run(folder.runs / "second", gain=0.2, created=START + 2)
    finished_run(folder.runs / "worse", gain=-0.1, created=START + 3)
    return folder


@pytest.fixture
def server(start_server: Callable[..., Any]) -> tuple[StandIn, str]:
    stand_in, address = start_server()
    stand_in.models = {"Limb": {str(START): BASE}}
    stand_in.may_merge = {"Limb"}
    return stand_in, address


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def listed(folder: ServerFolder) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("releases", "list", folder.path, "--json").output)
    return found


def current(folder: ServerFolder) -> list[str]:
    return [own["run"] for own in listed(folder) if own["current"]]


def file_of(folder: ServerFolder, name: str) -> Path:
    found = RunFolder(folder.runs / name)
    return found.release / found.result().release


def test_releases_are_listed_with_dice_digest_and_date(coordinator: ServerFolder) -> None:
    first, second = listed(coordinator)
    assert (first["run"], second["run"]) == ("first", "second")
    assert first["digest"] == digest(file_of(coordinator, "first").read_bytes())
    assert (first["base_dice"], first["dice"], second["dice"]) == pytest.approx((0.5, 0.6, 0.7))
    assert (first["current"], second["current"]) == (False, True)
    shown = run("releases", "list", coordinator.runs)
    assert shown.exit_code == 0, shown.exception
    assert "0.700" in shown.output


def test_going_back_holds_until_there_is_a_newer_release(coordinator: ServerFolder) -> None:
    done = run("releases", "rollback", coordinator.path, "first")
    assert done.exit_code == 0, done.exception
    assert current(coordinator) == ["first"]
    finished_run(coordinator.runs / "third", gain=0.25, created=START + 9)
    assert current(coordinator) == ["third"]
    assert run("releases", "rollback", coordinator.path, "second").exit_code == 0
    assert current(coordinator) == ["second"]


def test_versions_of_a_generation_are_listed_pushed_in_order_and_gone_back_to(
    coordinator: ServerFolder, server: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, address = server
    monkeypatch.setenv("DAFNE_API_KEY", KEY)
    info = RunFolder(coordinator.runs / "first").info()
    plan, base = RunFolder(coordinator.runs / "first").plan(), BASE
    generation = RunFolder.create(coordinator.runs / "thigh", info, plan, base)
    make_generation(generation, GenerationInfo())
    for number in (1, 2):
        path = generation.path / "versions" / f"{number:04d}"
        made = finished_run(path, gain=0.2 + number / 100, created=START + 10 + number)
        record = Continuation(version=number, start_digest="", new_cases={"a": 1})
        keep_continuation(made, record, STATE)
    assert [own["run"] for own in listed(coordinator)][2:] == ["thigh/0001", "thigh/0002"]
    assert current(coordinator) == ["thigh/0002"]
    files = [file_of(coordinator, f"thigh/versions/000{number}") for number in (1, 2)]
    push = ("--yes", "--server", address)
    for file in files:
        assert run("models", "push", file, *push).exit_code == 0
        assert stand_in.newest("Limb") == file.read_bytes()
    # What was published after a version would be lost; and its signature is asked for.
    assert run("models", "push", files[0], *push).exit_code == 3
    done = run("releases", "rollback", coordinator.path, "thigh/0001", *push)
    assert done.exit_code == 0, done.exception
    assert stand_in.newest("Limb") == files[0].read_bytes()
    assert current(coordinator) == ["thigh/0001"]
    (files[1].parent / SIGNATURE).unlink()
    with pytest.raises(DafneFederatedError, match=r"not published: .*not signed"):
        raise run("models", "push", files[1], *push).exception


@pytest.mark.parametrize("name", ["worse", "never"])
def test_nobody_goes_back_to_what_was_not_released(coordinator: ServerFolder, name: str) -> None:
    with pytest.raises(DafneFederatedError, match=r"a run with a release \(first, second\), got"):
        raise run("releases", "rollback", coordinator.path, name).exception
    assert current(coordinator) == ["second"]


def test_a_changed_release_is_not_gone_back_to(coordinator: ServerFolder) -> None:
    (file_of(coordinator, "first").parent / "model-card.html").write_text("<p>perfect</p>")
    with pytest.raises(DafneFederatedError, match=r"model-card\.html: was changed"):
        raise run("releases", "rollback", coordinator.path, "first").exception
    assert current(coordinator) == ["second"]


def test_going_back_on_a_server_publishes_the_earlier_one_again(
    coordinator: ServerFolder, server: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, address = server
    monkeypatch.setenv("DAFNE_API_KEY", KEY)
    first = file_of(coordinator, "first")
    assert run("models", "push", first, "--yes", "--server", address).exit_code == 0
    second = file_of(coordinator, "second").read_bytes()
    stand_in.models["Limb"][str(max(map(int, stand_in.models["Limb"])) + 1)] = second
    back = ("releases", "rollback", coordinator.path, "first", "--server", address)
    with pytest.raises(DafneFederatedError, match="expected --yes"):
        raise run(*back).exception
    done = run(*back, "--yes", "--json")
    assert done.exit_code == 0, done.exception
    versions = stand_in.models["Limb"]
    assert stand_in.newest("Limb") == first.read_bytes()
    assert json.loads(done.output)["version"] == max(map(int, versions))
    assert list(versions.values()).count(first.read_bytes()) == 2  # nothing was deleted
    assert current(coordinator) == ["first"]


def test_what_somebody_else_published_is_not_hidden(
    coordinator: ServerFolder, server: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, address = server
    monkeypatch.setenv("DAFNE_API_KEY", KEY)
    stand_in.models["Limb"][str(START + 5)] = OTHER
    done = run("releases", "rollback", coordinator.path, "first", "--server", address, "--yes")
    assert done.exit_code == 3
    assert "is none of these releases" in done.stderr
    assert stand_in.newest("Limb") == OTHER
    assert current(coordinator) == ["second"]


def test_verify_says_what_was_checked(coordinator: ServerFolder) -> None:
    release = file_of(coordinator, "first").parent
    done = run("verify", release, "--key", coordinator.release_public)
    assert done.exit_code == 0, done.exception
    assert "signature: fits the key that you gave" in done.output
    assert "files:     4 are what was signed" in done.output
    assert "compare the fingerprint" in run("verify", release).output
    facts = json.loads(run("verify", release, "--json").output)
    assert facts["files"].keys() == {
        "Limb.json", "model-card.html", "model-card.json", facts["model"],
    }  # fmt: skip
    with pytest.raises(DafneFederatedError, match="not signed"):
        raise run("verify", finished_run(coordinator.path.parent / "alone").release).exception


@pytest.mark.parametrize("lost", [SIGNATURE, MANIFEST])
def test_a_coordinators_release_without_a_signature_is_not_pushed(
    coordinator: ServerFolder,
    server: tuple[StandIn, str],
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    stand_in, address = server
    monkeypatch.setenv("DAFNE_API_KEY", KEY)
    file = file_of(coordinator, "first")
    (file.parent / lost).unlink()
    with pytest.raises(DafneFederatedError, match=r"not published: .*(not signed|got no release)"):
        raise run("models", "push", file, "--yes", "--server", address).exception
    assert stand_in.requests == []


def test_a_file_that_was_moved_out_is_known_by_the_signed_list(
    coordinator: ServerFolder,
    server: tuple[StandIn, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("DAFNE_API_KEY", KEY)
    moved = file_of(coordinator, "first").rename(tmp_path / "alone.model")
    origin = ("--run", coordinator.runs / "first")
    assert run("models", "push", moved, "--yes", *origin, "--server", server[1]).exit_code == 0


def test_help_has_examples() -> None:
    for command in (("releases", "list"), ("releases", "rollback"), ("verify",)):
        text = " ".join(run(*command, "--help").output.split())
        assert f"Example: dafne-federated {' '.join(command)}" in text
