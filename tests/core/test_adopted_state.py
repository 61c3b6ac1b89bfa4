"""A retrained model is adopted as the nearest state: exactly where the rank suffices."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafne_federated.core.adopted_state import adopt
from dafne_federated.core.errors import ModelFileError, StateError
from dafne_federated.core.model_file import ModelFile, parse_model
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import State, fold

TARGETS = (
    Target(key="0000", layer="c", kind="conv", shape=(3, 3, 4, 8)),
    Target(key="0001", layer="t", kind="conv-transpose", shape=(2, 2, 5, 8)),
    Target(key="0002", layer="d", kind="dense", shape=(6, 7)),
    Target(key="0003", layer="p", kind="conv", shape=(1, 1, 6, 5), inputs=(1, 4)),
    Target(key="0004", layer="h", kind="delta", shape=(1, 1, 4, 3)),
    Target(key="0005", layer="s", kind="scale", shape=(3, 3, 2, 4)),
    Target(key="0006", layer="u", kind="scale-transpose", shape=(2, 2, 3, 4)),
    Target(key="0007", layer="w", kind="scale-depthwise", shape=(3, 3, 4, 2)),
)
FULL = 8  # no matrix here has a larger rank


def made(seed: int = 1) -> tuple[ModelFile, AdaptationPlan]:
    generator = np.random.default_rng(seed)
    shapes = [*(target.shape for target in TARGETS), (9,)]  # the last one is not in the plan
    content = {
        "model_id": "family", "timestamp_id": 1, "metadata": {},
        "weights": [generator.normal(size=shape).astype(np.float32) for shape in shapes],
        "apply_model_function": "def f():\n    pass\n",
    }  # fmt: skip
    base = parse_model(pickle.dumps(content, protocol=4))
    plan = AdaptationPlan(
        base_digest=base.digest, method="lora", rank=2, max_rank=FULL, scale=0.5,
        labels=("x",), targets=TARGETS,
    )  # fmt: skip
    return base, plan


def drawn(plan: AdaptationPlan, seed: int, rank: int) -> State:
    generator = np.random.default_rng(seed)
    return {
        key: generator.normal(size=shape).astype(np.float32)
        for key, shape in plan.state_shapes(rank).items()
    }


def retrained(base: ModelFile, weights: dict[str, Any]) -> ModelFile:
    return replace(base, digest="", weights={**base.weights, **weights})


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_what_was_folded_at_a_rank_is_adopted_whole_at_that_rank(seed: int, rank: int) -> None:
    base, plan = made()
    model = retrained(base, fold(base.weights, plan, drawn(plan, seed, rank)))
    result = adopt(base, model, plan, rank)
    assert result.share == pytest.approx(1, abs=1e-10)
    assert min(result.shares.values()) == pytest.approx(1, abs=1e-9)
    assert result.left_out == {}
    folded = fold(base.weights, plan, result.state)
    for key, array in model.weights.items():
        np.testing.assert_allclose(folded[key], array, rtol=1e-5, atol=1e-4)


def test_at_full_rank_any_change_of_a_kernel_is_kept() -> None:
    base, plan = made()
    keys = ("0000", "0001", "0002", "0004")
    change = {key: made(2)[0].weights[key] for key in keys}
    result = adopt(base, retrained(base, change), plan, FULL)
    assert result.share == pytest.approx(1, abs=1e-10)
    folded = fold(base.weights, plan, result.state)
    for key in base.weights:
        np.testing.assert_allclose(folded[key], {**base.weights, **change}[key], atol=1e-5)


def test_more_rank_never_keeps_less_and_the_best_pair_is_that_of_the_svd() -> None:
    base, plan = made()
    change = {"0002": made(3)[0].weights["0002"]}
    shares = [adopt(base, retrained(base, change), plan, r).shares["0002"] for r in range(1, 7)]
    assert shares == sorted(shares)
    values = np.linalg.svd(
        change["0002"].astype(np.float64) - base.weights["0002"], compute_uv=False
    )
    want = np.cumsum(values**2) / np.sum(values**2)
    np.testing.assert_allclose(shares, want, atol=1e-6)


def test_nothing_changed_is_the_state_that_changes_nothing() -> None:
    base, plan = made()
    result = adopt(base, base, plan)
    assert result.share == 1
    assert set(result.shares.values()) == {1.0}
    for key, array in fold(base.weights, plan, result.state).items():
        np.testing.assert_array_equal(array, base.weights[key])


def test_what_the_plan_cannot_carry_is_named_and_counts() -> None:
    base, plan = made()
    change = {"0008": base.weights["0008"] + 3, "0004": base.weights["0004"] + 1}
    result = adopt(base, retrained(base, change), plan)
    assert result.left_out == {"0008": pytest.approx(9.0, rel=1e-6)}
    assert result.shares["0004"] == pytest.approx(1)
    assert result.share == pytest.approx(1)
    assert result.whole == pytest.approx(12 / (12 + 81), rel=1e-5)


def test_input_channels_that_a_pair_does_not_cover_are_counted_as_lost() -> None:
    base, plan = made()
    new = base.weights["0003"].copy()
    new[:, :, 0] += 1  # not covered
    new[:, :, 2] += 1  # covered, of rank 1
    assert adopt(base, retrained(base, {"0003": new}), plan).shares["0003"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_id": "another"}, "model id: expected 'family' as in the base, got 'another'"),
        ({"functions": {"apply_model_function": "def g(): pass"}}, "sources digest: expected"),
        ({"type": "DynamicTorchModel"}, "type: expected"),
        ({"is_delta": True}, "is delta: expected"),
        ({"weights": {}}, "other shapes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_only_a_model_retrained_from_the_base_is_adopted(
    change: dict[str, Any], words: str
) -> None:
    base, plan = made()
    with pytest.raises(ModelFileError, match=words):
        adopt(base, replace(base, **change), plan)


def test_values_ranks_and_plans_out_of_bounds_are_refused() -> None:
    base, plan = made()
    with pytest.raises(ModelFileError, match="'0004' has values that are not finite"):
        adopt(base, retrained(base, {"0004": base.weights["0004"] * np.nan}), plan)
    for rank in (0, FULL + 1):
        with pytest.raises(StateError, match=f"rank: expected 1 to {FULL}, got {rank}"):
            adopt(base, base, plan, rank)
    with pytest.raises(StateError, match="expected the base of the plan"):
        adopt(replace(base, digest="0" * 64), base, plan)
