"""Every command has help with an example, and mistakes end in one line and status 1."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from dafne_federated.cli.app import app, main
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.settings import RunSettings

NAMES = sorted(command.name or "" for command in app.registered_commands)


def run(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dafne_federated.cli.app", *arguments],
        capture_output=True, text=True, check=False, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert f"dafne-federated {name}" in " ".join(result.output.split())
    assert "Example" in result.output


def test_help_explains_arguments_and_options() -> None:
    text = " ".join(CliRunner().invoke(app, ["evaluate", "--help"]).output.split())
    assert "Folder of NIfTI pairs or Dafne bundles" in text
    assert "Write one line per case and label" in text


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch it-ran",)


def model_with(weights: object) -> bytes:
    content = {
        "model_id": "x", "weights": weights, "timestamp_id": 1, "metadata": {},
        "init_model_function": "def f():\n    pass\n",
        "apply_model_function": "def f(m, d):\n    pass\n",
        "incremental_learn_function": "def f(*a):\n    pass\n",
    }  # fmt: skip
    return pickle.dumps(content, protocol=4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (model_with(Runs()), "asks for 'posix.system'"),
        (model_with([np.ones(3, np.float32)])[:-5], "not a complete Dafne model"),
        (b"these are notes, not a model", "not a complete Dafne model"),
    ],
    ids=["code", "truncated", "text"],
)
@pytest.mark.parametrize("command", ["inspect", "approve"])
def test_bad_model_files_end_in_one_line(
    tmp_path: Path, command: str, data: bytes, words: str
) -> None:
    (tmp_path / "bad.model").write_bytes(data)
    done = run(command, "bad.model", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not (tmp_path / "it-ran").exists()


def test_a_weight_that_is_not_finite_is_said_and_stops_what_would_use_it(tmp_path: Path) -> None:
    (tmp_path / "nan.model").write_bytes(model_with([np.array([1, np.nan], np.float32)]))
    shown = run("inspect", "nan.model", cwd=tmp_path)
    assert shown.returncode == 0
    assert "not finite" in " ".join(shown.stdout.split())
    (tmp_path / "data").mkdir()
    for command in (("evaluate", "nan.model", "data"), ("simulate", "data", "--base", "nan.model")):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "nowhere.model"),
        ("evaluate", "nowhere.model", "nowhere"),
        ("check-data", "nowhere"),
        ("report", "nowhere"),
        ("merge", "nowhere", "--output", "new.model"),
        ("train", "nowhere", "--output", "new.model"),
        ("simulate", "nowhere"),
        ("simulate", "--strategy", "best"),
        ("simulate", "--sizes", "a,b"),
        ("simulate", "--settings", "nowhere.toml"),
        ("simulate", "--engine", "warp"),
    ],
    ids=" ".join,
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("dafne-federated: ")
    assert not (tmp_path / "new.model").exists()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("dafne_federated.cli.app.app", fails)


@pytest.mark.parametrize(
    ("error", "want"),
    [
        (DafneFederatedError("two\nlines \x1b[8m"), r"two\nlines \x1b[8m"),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError("disk\nfull"), r"disk\nfull"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    want: str,
) -> None:
    failing(monkeypatch, error)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"dafne-federated: {want}\n"


def test_a_value_that_does_not_fit_its_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        RunSettings(rank=0)
    failing(monkeypatch, caught.value)
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == (
        "dafne-federated: rank: Input should be greater than or equal to 1\n"
    )


def test_other_ends_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (SystemExit(3), KeyError("a fault of ours")):
        failing(monkeypatch, error)
        with pytest.raises(type(error)):
            main()


def test_a_home_that_cannot_be_written_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAFNE_FEDERATED_HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "a.model").write_bytes(model_with([np.ones(2, np.float32)]))
    done = run("approve", "a.model", "--yes", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
