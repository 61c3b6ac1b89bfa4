"""`train` says at once what it cannot do, before images are read or a network is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli import train as module
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.model_file import model_labels, read_model

app = typer.Typer()
app.command()(module.train)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a case or starting TensorFlow fails the test."""
    for name in ("load_case", "prepare_backend"):
        monkeypatch.delattr(module, name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--size", "5000"), "size: expected 16 to 1024 pixels, got 5000"),
        (("--resolution", "-1"), "resolution: expected more than 0"),
        (("--resolution", "nan"), "resolution: expected more than 0"),
        (("--learning-rate", "-1"), r"learning-rate: .*, got -1\.0"),
        (("--learning-rate", "nan"), "learning-rate: .*finite number"),
        (("--seed", "-1"), "seed: .*, got -1"),
        (("--device", "foo"), "device: .*, got 'foo'"),
        (("--preset", "arm"), "preset: expected 'small' or 'thigh', got 'arm'"),
        (("--site", "nosuch"), "site: expected one of 'clinic', 'hospital', got 'nosuch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_settings_that_cannot_be_are_refused_first(
    tmp_path: Path, squares_folder: Path, no_work: None, flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DafneFederatedError, match=words):
        raise run(squares_folder, "--output", tmp_path / "a.model", *flags).exception


def test_an_output_that_cannot_be_written_is_refused_first(
    tmp_path: Path, squares_folder: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    for output, words in ((file, "a file already"), (file / "a.model", "cannot be written")):
        with pytest.raises(DafneFederatedError, match=words):
            raise run(squares_folder, "--output", output).exception
    monkeypatch.setenv("DAFNE_FEDERATED_HOME", str(file / "home"))
    with pytest.raises(DafneFederatedError, match=r"approved-models\.json: cannot be written"):
        raise run(squares_folder, "--output", tmp_path / "a.model").exception


def test_two_numbers_of_one_name_are_refused_first(
    tmp_path: Path, squares_folder: Path, no_work: None
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("images", "labels", "participants.csv"):
        (folder / name).symlink_to(squares_folder / name)
    labels = {"1": "bright", "2": "bright"}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(DafneFederatedError, match="each number, got 'bright' 2 times"):
        raise run(folder, "--output", tmp_path / "a.model").exception


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_a_trained_model_is_written_and_approved(tmp_path: Path, squares_folder: Path) -> None:
    output = tmp_path / "new" / "a.model"
    done = run(squares_folder, "-o", output, "--epochs", 1, "--site", "clinic", "--name", "New")
    assert done.exit_code == 0, done.exception
    model = read_model(output)
    assert model.metadata["model_name"] == "New"
    assert Approvals().allows(model.digest)


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_a_grid_of_too_many_pixels_is_one_error(tmp_path: Path, squares_folder: Path) -> None:
    done = run(squares_folder, "-o", tmp_path / "a.model", "--resolution", "0.001")
    with pytest.raises(DafneFederatedError, match="at most 1024 pixels, got 40000"):
        raise done.exception
    assert done.output == ""


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_what_dafne_exports_trains_the_same_model_as_nifti_pairs(
    tmp_path: Path, squares_folder: Path, bundles_folder: Path
) -> None:
    models = []
    for folder in (squares_folder, bundles_folder):
        output = tmp_path / f"{folder.name}.model"
        done = run(folder, "-o", output, "--epochs", 1, "--sides", "--name", "Squares")
        assert done.exit_code == 0, done.exception
        models.append(read_model(output))
    assert models[0].content_digest == models[1].content_digest
    assert list((model_labels(models[1]) or {}).values()) == ["bright", "dark"]
