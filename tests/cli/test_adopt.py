"""`adopt` writes a state that passes the update gate and is merged like any other."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dafne_federated.cli.app import app
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.model_file import read_model
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import initial_state, load_state, save_state
from dafne_federated.core.wire import RoundReply, RoundRequest
from dafne_federated.strategies.update_gate import judge

RUN = "0" * 32


def model(path: Path, shift: float) -> Path:
    generator = np.random.default_rng(1)
    kernel = generator.normal(size=(6, 5)).astype(np.float32)
    content = {
        "model_id": "family", "timestamp_id": 1, "metadata": {"model_name": "Limb"},
        "weights": [kernel + np.float32(shift), np.full(5, shift, np.float32)],
        "init_model_function": "def f():\n    pass\n",
        "apply_model_function": "def f():\n    LABELS_DICT = {1: 'muscle'}\n",
        "incremental_learn_function": "def f():\n    pass\n",
    }  # fmt: skip
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, what somebody made of it, and a state of a run on the base."""
    base, upload = model(tmp_path / "base.model", 0), model(tmp_path / "theirs.model", 0.5)
    plan = AdaptationPlan(
        base_digest=read_model(base).digest, method="lora", rank=1, max_rank=4, scale=1.0,
        labels=("muscle",),
        targets=(Target(key="0000", layer="d", kind="dense", shape=(6, 5)),),
    )  # fmt: skip
    save_state(tmp_path / "state.npz", plan, initial_state(plan, 1))
    return base, upload, tmp_path / "state.npz"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_an_adopted_model_passes_the_gate_and_is_merged(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, upload, known = files
    output = tmp_path / "theirs.npz"
    done = run("adopt", base, upload, "-o", output, "--plan", known, "--json")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.output)
    assert told["shares"] == {"0000": pytest.approx(1)}  # an equal shift has rank 1
    assert told["share"] == pytest.approx(1)
    assert told["whole"] == pytest.approx(30 / 35)
    assert told["left_out"] == {"0001": pytest.approx(0.5 * 5**0.5)}
    plan, state = load_state(output)
    same = {"base_digest": plan.base_digest, "plan_digest": plan.digest}
    asked = RoundRequest(
        run=RUN, round=1, epochs=1, batch_size=4, learning_rate=0.01, seed=1, **same
    )
    reply = RoundReply(
        run=RUN,
        round=1,
        site="a",
        status="ok",
        training_cases=5,
        dice=[0.5],
        dice_cases=[1],
        **same,
    )
    verdict = judge("a", reply.to_record(state), asked, plan, max_cases=10)
    assert (verdict.status, verdict.reason) == ("ok", "")
    assert run("merge", output, "--base", base, "-o", tmp_path / "m.model").exit_code == 0
    merged = read_model(tmp_path / "m.model").weights
    np.testing.assert_allclose(merged["0000"], read_model(upload).weights["0000"], atol=1e-6)
    np.testing.assert_array_equal(merged["0001"], read_model(base).weights["0001"])


def test_what_is_kept_and_what_is_not_is_said(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, upload, known = files
    shown = run("adopt", base, upload, "-o", tmp_path / "theirs.npz", "--plan", known)
    assert shown.exit_code == 0, shown.exception
    assert "100.00%" in shown.output
    words = " ".join(shown.output.split())
    assert "100.00% of the change of what the plan trains is kept, 85.71% of the change" in words
    assert "not part of the plan: 0001" in shown.output


def test_a_plan_that_is_none_is_one_error(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, upload, known = files
    for plan in (base, tmp_path / "nowhere"):
        with pytest.raises(DafneFederatedError, match="expected a run folder or a state file"):
            raise run("adopt", base, upload, "-o", tmp_path / "x.npz", "--plan", plan).exception
    with pytest.raises(DafneFederatedError, match="expected the base of the plan"):
        raise run("adopt", upload, base, "-o", tmp_path / "x.npz", "--plan", known).exception
    assert not (tmp_path / "x.npz").exists()
