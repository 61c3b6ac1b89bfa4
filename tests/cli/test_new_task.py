"""`new-task` writes a model that a federation starts from, approved only where its base is."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dafne_federated.cli.app import app
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.function_sources import NetworkSpec
from dafne_federated.core.model_file import model_labels, read_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    spec = NetworkSpec(labels=("a", "b"), size=32, resolution=(1.0, 1.0))
    content = {
        "model_id": "family", "timestamp_id": 1, "metadata": {"model_name": "Limb"},
        "weights": [np.ones((1, 1, 4, 3), np.float32), np.ones(3, np.float32)],
        **spec.sources(),
    }  # fmt: skip
    path = tmp_path / "base.model"
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["new-task", *(str(a) for a in arguments)])


def test_it_says_what_was_made_and_what_comes_next(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "b.model"
    done = run(base, "-o", output, "--labels", "b, tendon", "--name", "Tendon")
    assert done.exit_code == 0, done.exception
    new = read_model(output)
    assert model_labels(new) == {1: "b", 2: "tendon"}
    assert done.output.splitlines() == [
        f"{output}  {new.digest}",
        f"name:   Tendon ({new.model_id})",
        "label:  1 b (kept from the base)",
        "label:  2 tendon (new, starts from the base's foreground)",
        "The base is not approved on this machine, so the new model is not, either:",
        f"next:   dafne-federated approve {output}",
        f"next:   dafne-federated simulate DATA --base {output}",
    ]
    assert not Approvals().allows(new.digest)


def test_it_is_approved_where_its_base_is(base: Path, tmp_path: Path) -> None:
    Approvals().add(read_model(base), "test")
    done = run(base, "-o", tmp_path / "b.model", "--labels", "x")
    assert done.exit_code == 0, done.exception
    assert "dafne-federated approve" not in done.output
    written = read_model(tmp_path / "b.model")
    why = Approvals().entries()[written.digest]["why"]
    assert why == f"made here by new-task from the approved {read_model(base).digest[:16]}"


def test_the_seed_counts(base: Path, tmp_path: Path) -> None:
    for name, seed in (("1", 5), ("2", 5), ("3", 6)):
        run(base, "-o", tmp_path / name, "--labels", "x", "--seed", seed)
    first, second, third = ((tmp_path / name).read_bytes() for name in "123")
    assert first == second != third


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labels", "a,b"], "has these already"),
        (["--labels", "a,,x"], "got ''"),
        (["--labels", "x,x"], "different names"),
        (["--labels", "x", "--name", "a_b"], "name: expected letters"),
    ],
)
def test_what_cannot_be_is_one_error_and_nothing_is_written(
    base: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    Approvals().add(read_model(base), "test")
    with pytest.raises(DafneFederatedError, match=words):
        raise run(base, "-o", tmp_path / "b.model", *arguments).exception
    assert not (tmp_path / "b.model").exists()
    assert len(Approvals().entries()) == 1


def test_a_file_that_is_there_stays(base: Path) -> None:
    before = base.read_bytes()
    with pytest.raises(DafneFederatedError, match="there is a file already"):
        raise run(base, "-o", base, "--labels", "x").exception
    assert base.read_bytes() == before


@pytest.mark.slow
def test_a_federation_starts_from_it(trained: Any, squares_folder: Path, tmp_path: Path) -> None:
    Approvals().add(read_model(trained.path), "test")
    data = tmp_path / "data"
    shutil.copytree(squares_folder, data)
    (data / "dataset.json").write_text(
        '{"name": "Squares", "labels": {"1": "bright", "2": "shade"}}'
    )
    new = tmp_path / "new.model"
    assert run(trained.path, "-o", new, "--labels", "shade,bright").exit_code == 0
    command = [
        *("simulate", str(data), "--base", str(new), "--run", str(tmp_path / "run"), "--quiet"),
        *("--rounds", "1", "--epochs", "8", "--learning-rate", "0.01", "--gate", "none"),
        *("--no-local-only", "--device", "cpu", "--threads", "2"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    (released,) = (tmp_path / "run" / "release").glob("*.model")
    model = read_model(released)
    assert model.model_id == read_model(new).model_id
    assert model_labels(model) == {1: "shade", 2: "bright"}
    assert model.metadata["derived_from"]["base_sha256"] == read_model(trained.path).digest
    assert model.metadata["federated"]["base_sha256"] == read_model(new).digest
