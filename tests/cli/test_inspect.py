"""`inspect` shows what a file says, and nothing of it can pass for a word of ours."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli.inspect import inspect
from dafne_federated.cli.printable import json_value, printable, printable_source

app = typer.Typer()
app.command()(inspect)


def model_at(path: Path, **changes: Any) -> Path:
    content = {
        "model_id": "family", "weights": [np.ones(2, np.float32)], "timestamp_id": 1,
        "is_delta": False, "data_dimensionality": 2, "type": "DynamicDLModel", "metadata": {},
        "init_model_function": "def f():\n    pass\n",
        "apply_model_function": "def f():\n    LABELS_DICT = {1: 'a'}\n",
        "incremental_learn_function": "def f():\n    pass\n",
    }  # fmt: skip
    path.write_bytes(pickle.dumps(content | changes, protocol=4))
    return path


def shown(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    return done.output


def test_controls_and_markup_of_a_file_are_shown_not_obeyed(tmp_path: Path) -> None:
    name = "Thigh\x1b[2K\ndigest 000 \x9b8m\u202e[/red]"
    path = model_at(tmp_path / "a.model", metadata={"model_name": name}, type="[bold]FAKE[/]")
    text = shown(path)
    assert r"Thigh\x1b[2K\ndigest 000 \x9b8m\u202e[/red]" in text
    assert "[bold]FAKE[/]" in text
    assert "\x1b" not in text
    assert all(ord(c) < 0x80 or c.isprintable() for c in shown(path, "--json"))


def test_the_digest_is_shown_whole(tmp_path: Path) -> None:
    path = model_at(tmp_path / "a.model")
    done = CliRunner().invoke(app, [str(path)], env={"COLUMNS": "60"})
    assert "…" not in done.output


def test_metadata_that_is_not_json_is_shown_as_text(tmp_path: Path) -> None:
    values = {"ewc": np.ones(2), "raw": b"x", "bad": float("nan"), 3: (1, 2)}
    path = model_at(tmp_path / "a.model", metadata=values)
    found = json.loads(shown(path, "--json"))["metadata"]
    assert found == {"ewc": "array([1., 1.])", "raw": "b'x'", "bad": "nan", "3": [1, 2]}
    assert "array([1., 1.])" in shown(path)


@pytest.mark.parametrize("metadata", ["text", {"model_name": 3}, {"info": "text"}])
def test_metadata_of_any_form_can_be_looked_at(tmp_path: Path, metadata: Any) -> None:
    assert "family" in shown(model_at(tmp_path / "a.model", metadata=metadata))


def test_sources_keep_their_lines_and_lose_their_controls(tmp_path: Path) -> None:
    source = "def f():\r\n\treturn '\x1b[8m[red]'\n"
    text = shown(model_at(tmp_path / "a.model", init_model_function=source), "--sources")
    assert "def f():\n        return '\\x1b[8m[red]'\n" in text


def test_printable_text_is_one_line_and_plain_text_stays() -> None:
    assert printable("Vastus Médialis (L)") == "Vastus Médialis (L)"
    assert printable("a\r\n\ud800") == r"a\r\n\ud800"
    assert printable(["é", None]) == '["é", null]'
    assert printable_source("a\tb\x0c\n") == "a       b\\x0c\n"
    assert json_value({"a": [True, 1.5, {1}]}) == {"a": [True, 1.5, "{1}"]}
