"""`methods` prints what each method costs on an approved model, in words or JSON."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.cli.methods import methods  # noqa: E402
from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.dry_run import bench_of, drawn_case, dry_run  # noqa: E402
from dafne_federated.core.errors import ApprovalError, RunError, SettingsError  # noqa: E402
from dafne_federated.core.findings import ModelExpectation, expectation_of  # noqa: E402
from dafne_federated.core.function_sources import NetworkSpec  # noqa: E402
from dafne_federated.core.methods import METHODS, plan_targets  # noqa: E402
from dafne_federated.core.model_file import write_model  # noqa: E402

app = typer.Typer()
app.command()(methods)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, backend: None) -> tuple[Path, Any]:
    from dafne_federated.core.model_runtime import build_model

    spec = NetworkSpec(
        labels=("bright", "dark"), size=40, resolution=(1.0, 1.0), filters=(4, 8), strides=(2,)
    )
    file = build_model("small", spec.sources(), 1_700_000_000, {"model_name": "Small"})
    path = tmp_path_factory.mktemp("model") / "small.model"
    return path, write_model(file, path)


@pytest.fixture
def model(built: tuple[Path, Any]) -> Path:
    path, file = built
    Approvals().add(file, "made by a test")
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def facts(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_every_method_has_a_row_with_its_true_size(model: Path, built: tuple[Path, Any]) -> None:
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.network_layers import describe_layers

    found = facts(model, "--no-timing")
    rows = {row["method"].split(" ")[0]: row for row in found["methods"]}
    assert set(METHODS) <= set(rows)
    running = RunningModel(built[1], Approvals())
    for name in ("head", "norm", "full"):
        targets = plan_targets(name, describe_layers(running.network))
        values = sum(int(np.prod(target.shape)) for target in targets)
        row = rows[name]
        assert (row["parameters"], row["bytes"]) == (values, 4 * values)
        assert row["share"] == pytest.approx(values / built[1].parameters)
    assert rows["head"]["cacheable"]
    assert rows["head"]["frozen"] > 0.9
    assert not rows["full"]["cacheable"]
    assert all(row["epoch_seconds"] is None for row in found["methods"])
    assert "time and memory not measured" in found["recommended"]


def test_the_table_is_for_people(model: Path) -> None:
    result = invoke(model, "--no-timing")
    assert result.exit_code == 0
    for words in ("last-k --last 2", "scale and shift of the normalisations", "cacheable"):
        assert words in result.stdout
    assert "Recommended here: --method" in result.stdout


def test_time_and_memory_are_measured(model: Path, squares_folder: Path) -> None:
    found = facts(model, "--data", squares_folder, "--only", "full", "--batch-size", "2")
    (row,) = found["methods"]
    assert row["epoch_seconds"] > 0
    assert row["peak_mib"] > row["training_mib"] >= 0
    assert found["slices"] == 8 * 4  # eight persons of four slices
    assert "An epoch is 32 slices in steps of 2 on CPU" in found["notes"][-1]


def test_the_memory_of_this_process_is_not_counted(model: Path, built: tuple[Path, Any]) -> None:
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.new_run import make_plan
    from dafne_federated.core.settings import RunSettings

    plan = make_plan(RunningModel(built[1], Approvals()), RunSettings(method="head"))
    ballast = np.ones((1500, 2**20), np.uint8)
    with bench_of(model, None, "", 2, 1, "cpu") as bench:
        found = dry_run(bench, plan)
    assert ballast.nbytes > 2**30
    assert found.peak_mib is None or found.peak_mib < 1500
    assert found.kept_slices == 1


class Ends:
    """Ends the process that unpickles it, as the system does when memory runs out."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (9,)


def test_a_process_that_ends_is_said_in_words(model: Path) -> None:
    words = "ended by itself, most likely because memory"
    with bench_of(model, None, "", 2, 1, "cpu") as bench, pytest.raises(RunError, match=words):
        dry_run(bench, Ends())  # type: ignore[arg-type]


def test_mistakes_are_errors_of_ours(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(invoke(model, "--only", "best").exception, SettingsError)
    found = facts(model, "--no-timing", "--only", "last-k", "--last", "99")
    assert "at most the 8 layers" in found["methods"][0]["refused"]
    assert found["recommended"].startswith("No method fits")
    monkeypatch.setenv("DAFNE_FEDERATED_HOME", str(tmp_path / "elsewhere"))
    assert isinstance(invoke(model, "--no-timing").exception, ApprovalError)


def test_a_drawn_case_has_all_labels_apart(built: tuple[Path, Any]) -> None:
    case = drawn_case(expectation_of(built[1]))
    assert case.image.shape == (40, 40, 1)
    assert case.masks.keys() == {"bright", "dark"}
    many = ModelExpectation(tuple(map(str, range(14))), "", (1.5, 1.5), (33, 64))
    masks = np.stack(list(drawn_case(many).masks.values()))
    assert masks.any(axis=(1, 2, 3)).all()
    assert masks.sum(axis=0).max() == 1
