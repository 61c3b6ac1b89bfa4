"""`merge` folds a round or a state file, says where the result comes from, and fails early."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli.merge import merge
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.files import arrays_digest, sha256
from dafne_federated.core.model_file import read_model
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, fold, save_state

app = typer.Typer()
app.command()(merge)
STATES: list[State] = [{"0000/delta": np.float32([k, 2 * k])} for k in (1, 2)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    content = {
        "model_id": "family", "weights": [np.ones(2, np.float32)], "timestamp_id": 1,
        "metadata": {"model_name": "Limb", "federated": {"run": "an earlier one"}},
        "init_model_function": "def f():\n    pass\n",
        "apply_model_function": "def f():\n    LABELS_DICT = {1: 'muscle'}\n",
        "incremental_learn_function": "def f():\n    pass\n",
    }  # fmt: skip
    path = tmp_path / "base.model"
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


@pytest.fixture
def plan(base: Path) -> AdaptationPlan:
    return AdaptationPlan(
        base_digest=sha256(base.read_bytes()),
        method="head",
        rank=1,
        max_rank=1,
        scale=1.0,
        labels=("muscle",),
        targets=(Target(key="0000", layer="head", kind="delta", shape=(2,)),),
    )


@pytest.fixture
def make_run(tmp_path: Path, base: Path, plan: AdaptationPlan) -> Callable[[int], Path]:
    def make(rounds: int) -> Path:
        info = RunInfo(
            run="0" * 32,
            created=1_700_000_000,
            base_digest=plan.base_digest,
            base_name="Limb",
            plan_digest=plan.digest,
            settings=RunSettings(rounds=2),
            versions={},
            command="",
        )
        folder = RunFolder.create(tmp_path / "run", info, plan, base.read_bytes())
        for number in range(1, rounds + 1):
            state = STATES[min(number, 2) - 1]
            line = RoundLine(
                round=number, trained=number < 3, sites={}, aggregation_error=None,
                state_digest=arrays_digest(state), seconds=1.0,
            )  # fmt: skip
            folder.finish_round(line, state)
        return folder.path

    return make


def test_a_run_without_a_common_model_is_refused_and_names_the_way_out(
    tmp_path: Path, make_run: Any
) -> None:
    path = make_run(3)
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text.replace('"product"', '"shared-a"'))
    done = run(path, "--output", tmp_path / "merged.model")
    assert isinstance(done.exception, DafneFederatedError)
    assert "there is no model for everybody; give the newest state in" in str(done.exception)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(("chosen", "number"), [((), 2), (("--round", 1), 1)])
def test_a_round_is_folded_and_says_where_it_comes_from(
    tmp_path: Path, base: Path, plan: AdaptationPlan, make_run: Any, chosen: Any, number: int
) -> None:
    output = tmp_path / "new" / "merged.model"
    done = run(make_run(3), "--output", output, *chosen)
    assert done.exit_code == 0, done.exception
    merged = read_model(output)
    want = fold(read_model(base).weights, plan, STATES[number - 1])
    np.testing.assert_array_equal(merged.weights["0000"], want["0000"])
    told = merged.metadata["federated"]
    assert (told["run"], told["rounds"], told["base_sha256"]) == (
        "0" * 32, number, plan.base_digest,
    )  # fmt: skip
    assert told["plan_sha256"] == plan.digest


def test_a_state_file_says_what_it_knows(tmp_path: Path, base: Path, plan: AdaptationPlan) -> None:
    state, output = tmp_path / "state.npz", tmp_path / "merged.model"
    save_state(state, plan, STATES[0])
    done = run(state, "--base", base, "--output", output)
    assert done.exit_code == 0, done.exception
    told = read_model(output).metadata["federated"]
    assert sorted(told) == [
        "base_name", "base_sha256", "date", "method", "plan_sha256", "rank", "software",
    ]  # fmt: skip
    assert (told["base_sha256"], told["method"]) == (plan.base_digest, "head")
    json.dumps(told)


@pytest.mark.parametrize(("weights", "share"), [((), 0.5), (("--weights", "3,1"), 0.75)])
def test_of_several_states_the_mean_of_what_they_do_is_folded(
    tmp_path: Path, base: Path, plan: AdaptationPlan, weights: Any, share: float
) -> None:
    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for file, state in zip(files, STATES, strict=True):
        save_state(file, plan, state)
    done = run(*files, "--base", base, "--output", tmp_path / "merged.model", *weights)
    assert done.exit_code == 0, done.exception
    want = 1 + share * np.float32([1, 2]) + (1 - share) * np.float32([2, 4])
    np.testing.assert_allclose(read_model(tmp_path / "merged.model").weights["0000"], want)


def test_states_of_several_plans_are_not_mixed(
    tmp_path: Path, base: Path, plan: AdaptationPlan
) -> None:
    other = plan.model_copy(update={"labels": ("bone",)})
    files = [tmp_path / "one.npz", tmp_path / "two.npz"]
    for file, its in zip(files, (plan, other), strict=True):
        save_state(file, its, STATES[0])
    output = ("--output", tmp_path / "merged.model")
    for arguments, words in (
        ((*files, "--base", base), "two.npz: expected a state of the plan of one.npz"),
        (files, "expected --base FILE and no --round with several"),
        ((files[0], files[0], "--base", base, "--weights", "1"), "expected 2 whole numbers"),
        ((files[0], files[0], "--base", base, "--weights", "1,0"), "expected 2 whole numbers"),
    ):
        with pytest.raises(DafneFederatedError, match=words):
            raise run(*arguments, *output).exception


def test_what_cannot_be_merged_is_one_error(
    tmp_path: Path, base: Path, plan: AdaptationPlan, make_run: Any
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    np.save(tmp_path / "x.npy", np.ones(3))
    save_state(tmp_path / "state.npz", plan, STATES[0])
    output = tmp_path / "merged.model"
    with_rounds = make_run(2)
    for arguments, words in (
        ((other,), "is .* the folder of a run"),
        ((with_rounds, "--round", 7), "round: expected one of 1 to 2, got 7"),
        ((tmp_path / "x.npy", "--base", base), "expected the folder of a run or a state file"),
        ((tmp_path / "nowhere",), "expected the folder of a run or a state file"),
        ((tmp_path / "state.npz",), "expected --base FILE"),
        ((tmp_path / "state.npz", "--base", base, "--round", 1), "got --round"),
    ):
        with pytest.raises(DafneFederatedError, match=words) as caught:
            raise run(*arguments, "--output", output).exception
        assert "\n" not in str(caught.value)
        assert not output.exists()


def test_a_run_without_rounds_is_one_error(tmp_path: Path, make_run: Any) -> None:
    with pytest.raises(DafneFederatedError, match="at least one finished round, got none"):
        raise run(make_run(0), "--output", tmp_path / "merged.model").exception


def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(base: Path) -> None:
    for output, words in ((base, "there is a file already"), (base / "x.model", "cannot be wri")):
        with pytest.raises(DafneFederatedError, match=words):
            raise run("nowhere", "--output", output).exception
