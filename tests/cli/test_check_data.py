"""`check-data` reports in words or JSON, and its exit status says whether to go on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli.check_data import check_data
from dafne_federated.core.errors import DataError
from dafne_federated.core.model_file import ModelFile, write_model
from dafne_federated.simulations.phantoms import write_phantoms

app = typer.Typer()
app.command()(check_data)
SOURCE = """def function(modelObj):
    LABELS_DICT = {1: 'vastus', 2: 'rectus', 3: 'hamstring', 4: 'adductor'}
    MODEL_RESOLUTION = [2.0, 2.0]
    MODEL_SIZE = [96, 96]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_phantoms(tmp_path / "limbs", {"base": 2}, seed=1).path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    names = ("init_model_function", "apply_model_function", "incremental_learn_function")
    content = ModelFile(
        digest="",
        model_id="phantom",
        timestamp_id=1_700_000_000,
        type="DynamicDLModel",
        dimensionality=2,
        is_delta=False,
        metadata={"orientation": "Sagittal"},
        functions=dict.fromkeys(names, SOURCE),
        kind="keras",
        weights={"0000": np.zeros(3, np.float32)},
    )
    write_model(content, tmp_path / "phantom.model")
    return tmp_path / "phantom.model"


def test_a_good_folder_ends_with_status_0(folder: Path) -> None:
    result = CliRunner().invoke(app, [str(folder)])
    assert result.exit_code == 0
    assert "Phantom limbs: 2 cases, 0 errors, 0 warnings and 0 notes." in result.stdout


def test_errors_end_with_status_1_and_are_said_once(folder: Path, model: Path) -> None:
    command = [str(folder), "--model", str(model)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert result.stdout.count("base-000 and base-001") == 1
    assert result.stdout.count("Errors") == 1
    assert "2 cases, 2 errors, 0 warnings and 0 notes." in result.stdout


def test_json_is_a_list_of_findings(folder: Path, model: Path) -> None:
    result = CliRunner().invoke(app, [str(folder), "--model", str(model), "--json"])
    assert result.exit_code == 1
    findings = json.loads(result.stdout)
    assert [(f["severity"], f["case"]) for f in findings] == [
        ("error", "base-000"),
        ("error", "base-001"),
    ]
    assert findings[0]["what"] == "The slices are axial, the model works on sagittal ones."
    assert json.loads(CliRunner().invoke(app, [str(folder), "--json"]).stdout) == []


def test_names_are_printed_as_they_are(folder: Path) -> None:
    title = json.loads((folder / "dataset.json").read_text())
    title["labels"]["5"] = "[red]gracilis"
    (folder / "dataset.json").write_text(json.dumps(title))
    result = CliRunner().invoke(app, [str(folder)])
    assert "[red]gracilis" in result.stdout


def test_what_is_no_data_folder_is_one_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "none")])
    assert isinstance(result.exception, DataError)


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert "dafne-federated check-data my-scans --model Thigh.model" in result.stdout


@pytest.mark.skipif(
    "DAFNE_FEDERATED_TEST_DATA" not in os.environ,
    reason="DAFNE_FEDERATED_TEST_DATA names no folder of real data",
)
def test_real_data_end_with_status_0() -> None:
    data = Path(os.environ["DAFNE_FEDERATED_TEST_DATA"]) / "spinalcord_gm"
    result = CliRunner().invoke(app, [str(data)])
    assert result.exit_code == 0
    assert "6 cases, 0 errors" in result.stdout
