"""`approve` shows what a person decides about, and a file cannot draw lines of its own."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli.approve import approve
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.model_file import read_model

app = typer.Typer()
app.command()(approve)


def model_at(path: Path, metadata: Any, labels: str = "{1: 'a', 2: 'b'}") -> Path:
    content = {
        "model_id": "family", "weights": [], "timestamp_id": 1, "metadata": metadata,
        "init_model_function": "def f():\n    pass\n",
        "apply_model_function": f"def f():\n    LABELS_DICT = {labels}\n",
        "incremental_learn_function": "def f():\n    pass\n",
    }  # fmt: skip
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


def test_it_is_approved_only_after_a_yes(tmp_path: Path) -> None:
    path = model_at(tmp_path / "a.model", {"model_name": "Thigh", "info": {"Author": "Ada"}})
    digest = read_model(path).digest
    refused = CliRunner().invoke(app, [str(path)], input="n\n")
    assert refused.exit_code == 1
    assert not Approvals().allows(digest)
    agreed = CliRunner().invoke(app, [str(path)], input="y\n")
    assert agreed.exit_code == 0
    assert Approvals().allows(digest)
    lines = agreed.output.splitlines()
    assert lines[:3] == ["name:     Thigh", "author:   Ada", "labels:   a, b"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"model_name": "T\x1b[2K\ndigest:   000\nprogram:  the same", "info": {"Author": "A\nB"}},
        {"model_name": ["a\nb"], "info": "text\nwith lines"},
        "text",
    ],
)
def test_each_line_is_ours(tmp_path: Path, metadata: Any) -> None:
    path = model_at(tmp_path / "a.model", metadata, r"{1: 'a\ndigest: 000', 2: 'b\x9b2K'}")
    done = CliRunner().invoke(app, [str(path), "--yes"])
    assert done.exit_code == 0, done.exception
    words = [line.split(":")[0] for line in done.output.splitlines()]
    assert words == ["name", "author", "labels", "digest", "program", "Approved."]
    assert "\x1b" not in done.output
    assert "\x9b" not in done.output
