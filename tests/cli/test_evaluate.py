"""`evaluate` measures what it is told to, and says at once what it cannot do."""

import csv
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli import evaluate as module
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.model_file import read_model

app = typer.Typer()
app.command()(module.evaluate)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "foo"), "device: .*, got 'foo'"),
        (("--threads", "-1"), "threads: .*, got -1"),
        (("--site", "nosuch"), "site: expected one of 'clinic', 'hospital', got 'nosuch'"),
        (("--csv", "{file}/a.csv"), "cannot be written"),
        (("--csv", "{folder}"), "there is a folder already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_said_before_any_work(
    tmp_path: Path,
    squares_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    words: str,
) -> None:
    for name in ("read_model", "load_case", "prepare_backend"):
        monkeypatch.delattr(module, name)
    (tmp_path / "file").touch()
    given = [flag.format(file=tmp_path / "file", folder=tmp_path) for flag in flags]
    with pytest.raises(DafneFederatedError, match=words):
        raise run("nowhere.model", squares_folder, *given).exception


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_one_site_is_measured_and_a_csv_replaced(
    tmp_path: Path, squares_folder: Path, trained: Any
) -> None:
    Approvals().add(read_model(trained.path), "test")
    path = tmp_path / "a.csv"
    path.write_text("old")
    done = run(trained.path, squares_folder, "--site", "clinic", "--csv", path)
    assert done.exit_code == 0, done.exception
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["label"] for row in rows} == {"bright", "dark"}
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
def test_an_error_behind_the_progress_bar_leaves_no_other_line(
    squares_folder: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_args: object) -> None:
        msg = "a damaged case"
        raise DafneFederatedError(msg)

    Approvals().add(read_model(trained.path), "test")
    monkeypatch.setattr(module, "load_case", damaged)
    done = run(trained.path, squares_folder)
    assert str(done.exception) == "a damaged case"
    assert done.output == ""
