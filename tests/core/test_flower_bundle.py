"""A site's guard accepts the bundle that is written here, and nothing that holds more."""

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from dafne_federated.core.errors import ApprovalError, SettingsError
from dafne_federated.core.flower_bundle import RUNS, check_bundle, run_folder_path, write_app


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """What is in the bundle that Flower makes of our app, by name."""
    folder = tmp_path / "app"
    folder.mkdir()
    write_app(folder, tmp_path / "run 'one'")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def changed(files: dict[str, bytes], old: str, new: str) -> bytes:
    text = files["pyproject.toml"].decode()
    assert old in text
    return packed(files | {"pyproject.toml": text.replace(old, new).encode()})


def test_what_flower_makes_of_our_app_is_accepted(files: dict[str, bytes]) -> None:
    check_bundle(packed(files))
    assert set(files) == {"pyproject.toml", "README.md", ".info/CONTENT"}


def test_no_path_of_the_coordinator_is_in_a_bundle(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [name for name, text in files.items() if str(tmp_path.parent).encode() in text]
    config = tomllib.loads(files["pyproject.toml"].decode())["tool"]["flwr"]["app"]["config"]
    assert config == {"run": "run 'one'"}
    monkeypatch.setenv(RUNS, str(tmp_path))
    assert run_folder_path(config) == tmp_path / "run 'one'"


@pytest.mark.parametrize("name", ["", ".", "..", "../run", "a/b", "/tmp/run"])
def test_a_run_lies_nowhere_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNS, str(tmp_path))
    with pytest.raises(SettingsError, match="expected the name of a run"):
        run_folder_path({"run": name})
    monkeypatch.delenv(RUNS)
    if not name.startswith("/"):
        with pytest.raises(SettingsError, match=RUNS):
            run_folder_path({"run": name})


@pytest.mark.parametrize(
    "name",
    [
        "dafne_federated/client/app.py",
        "sitecustomize.py",
        "numpy.so",
        "a.pth",
        "../pyproject.toml",
        "/etc/passwd",
        "pyproject.toml/x",
        "Readme.md",
        "README.md/",
    ],
)
def test_any_other_file_is_refused(files: dict[str, bytes], name: str) -> None:
    with pytest.raises(ApprovalError, match="holds more than configuration"):
        check_bundle(packed(files | {name: b""}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(files: dict[str, bytes]) -> None:
    buffer = io.BytesIO(packed(files))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("pyproject.toml", b"")
    with pytest.raises(ApprovalError, match="each file once"):
        check_bundle(buffer.getvalue())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("dafne_federated.client.app:app", "os:system", "names other programs .*os:system"),
        ("dafne_federated.server.app:app", "other:app", "names other programs"),
        ('serverapp = "dafne_federated.server.app:app"', "", "names other programs"),
        ("[tool.flwr.app.config]", "[tool.flwr.app.hooks]\na = 1\n[tool.flwr.app.config]", "hooks"),
        ("[project]", "[build-system]\nrequires = []\n[project]", "build-system"),
        ("[tool.flwr.app]", "[tool.flwr]", "settings that it should not.*publisher"),
        ("[tool.flwr.app.components]", "[components]", "not the configuration of a Flower app"),
        ("[project]", "[project", "not the configuration of a Flower app"),
    ],
)
def test_other_programs_and_settings_are_refused(
    files: dict[str, bytes], old: str, new: str, words: str
) -> None:
    with pytest.raises(ApprovalError, match=words):
        check_bundle(changed(files, old, new))


def test_what_is_no_bundle_is_refused(files: dict[str, bytes]) -> None:
    for content in (b"", b"PK", packed(files)[:-30]):
        with pytest.raises(ApprovalError, match="damaged"):
            check_bundle(content)
    with pytest.raises(ApprovalError, match="each file once"):
        check_bundle(packed({"README.md": b""}))
    with pytest.raises(ApprovalError, match="more than 65536 bytes"):
        check_bundle(packed(files | {"README.md": bytes(70_000)}))
