"""A state is checked, kept and folded exactly, with numpy alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import (
    State,
    check_state,
    fold,
    initial_state,
    kernel_update,
    load_state,
    save_state,
    state_bytes,
)

CONV = Target(key="0000", layer="c", kind="conv", shape=(3, 3, 4, 8))
TRANSPOSED = Target(key="0002", layer="t", kind="conv-transpose", shape=(2, 2, 5, 8))
DENSE = Target(key="0004", layer="d", kind="dense", shape=(6, 7))
WHOLE = Target(key="0005", layer="h", kind="delta", shape=(7,))


@pytest.fixture
def plan() -> AdaptationPlan:
    return AdaptationPlan(
        base_digest="0" * 64,
        method="lora",
        rank=2,
        max_rank=4,
        scale=0.5,
        labels=("a",),
        targets=(CONV, TRANSPOSED, DENSE, WHOLE),
    )


@pytest.fixture
def weights(plan: AdaptationPlan) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    shapes = {target.key: target.shape for target in plan.targets} | {"0001": (8,), "0003": (5,)}
    return {k: generator.normal(size=s).astype("float32") for k, s in shapes.items()}


def random_state(plan: AdaptationPlan, rank: int | None = None) -> State:
    generator = np.random.default_rng(2)
    return {
        key: generator.normal(size=shape).astype("float32")
        for key, shape in plan.state_shapes(rank).items()
    }


def test_a_fresh_state_changes_nothing(
    plan: AdaptationPlan, weights: dict[str, np.ndarray]
) -> None:
    folded = fold(weights, plan, initial_state(plan, seed=0))
    for key, array in weights.items():
        np.testing.assert_array_equal(folded[key], array)


def test_a_fresh_state_follows_its_seed(plan: AdaptationPlan) -> None:
    one, two, other = (initial_state(plan, seed) for seed in (1, 1, 2))
    assert state_bytes(plan, one) == state_bytes(plan, two)
    assert state_bytes(plan, one) != state_bytes(plan, other)


def test_only_planned_weights_change(plan: AdaptationPlan, weights: dict[str, np.ndarray]) -> None:
    folded = fold(weights, plan, random_state(plan))
    changed = {k for k in weights if not np.array_equal(folded[k], weights[k])}
    assert changed == {"0000", "0002", "0004", "0005"}
    assert {k: (v.shape, v.dtype) for k, v in folded.items()} == {
        k: (v.shape, v.dtype) for k, v in weights.items()
    }


def test_kernel_updates_are_the_sums_that_define_them(plan: AdaptationPlan) -> None:
    state = random_state(plan)
    conv = np.einsum("hwir,ro->hwio", state["0000/a"], state["0000/b"], dtype=np.float64)
    turned = np.einsum("ir,rhwo->hwoi", state["0002/a"], state["0002/b"], dtype=np.float64)
    np.testing.assert_allclose(kernel_update(CONV, state["0000/a"], state["0000/b"]), conv)
    np.testing.assert_allclose(kernel_update(TRANSPOSED, state["0002/a"], state["0002/b"]), turned)


def test_fold_adds_the_scaled_update(plan: AdaptationPlan, weights: dict[str, np.ndarray]) -> None:
    state = random_state(plan)
    folded = fold(weights, plan, state)
    want = weights["0004"] + 0.5 * state["0004/a"].astype(float) @ state["0004/b"].astype(float)
    np.testing.assert_allclose(folded["0004"], want, atol=1e-6)
    np.testing.assert_array_equal(folded["0005"], weights["0005"] + state["0005/delta"])


COVERED = (
    Target(key="0000", layer="c", kind="conv", shape=(3, 3, 4, 8), inputs=(1, 3)),
    Target(key="0002", layer="t", kind="conv-transpose", shape=(2, 2, 5, 8), inputs=(4, 8)),
)
SCALED = (
    Target(key="0000", layer="c", kind="scale", shape=(3, 3, 4, 8)),
    Target(key="0002", layer="t", kind="scale-transpose", shape=(2, 2, 5, 8)),
    Target(key="0004", layer="d", kind="delta", shape=(6, 7)),
)


@pytest.mark.parametrize("targets", [(CONV, TRANSPOSED, DENSE), COVERED, SCALED])
def test_a_folded_weight_is_the_float64_sum_rounded_once(
    plan: AdaptationPlan, weights: dict[str, np.ndarray], targets: tuple[Target, ...]
) -> None:
    plan = plan.model_copy(update={"targets": targets})
    for array in weights.values():
        array[..., 0] = -0.0  # whose sign stays where nothing is added
    state = random_state(plan)
    folded = fold(weights, plan, state)
    for target in targets:
        base = weights[target.key].astype(np.float64)
        if target.low_rank:
            pair = state[f"{target.key}/a"], state[f"{target.key}/b"]
            change = plan.scale * kernel_update(target, *pair)
        elif target.kind == "delta":
            change = state[f"{target.key}/delta"].astype(np.float64)
        else:
            change = base * state[f"{target.key}/scale"].astype(np.float64)
        want = (base + change).astype(np.float32)
        np.testing.assert_array_equal(folded[target.key], want)
        covered = np.pad(np.ones(target.covered, bool), target.padding())
        rest = [array[target.key][~covered].tobytes() for array in (folded, weights)]
        assert rest[0] == rest[1]


def test_a_weight_without_axes_is_folded(plan: AdaptationPlan) -> None:
    single = Target(key="0000", layer="s", kind="delta", shape=())
    plan = plan.model_copy(update={"targets": (single,)})
    folded = fold({"0000": np.float32(2)[...]}, plan, {"0000/delta": np.float32(3)[...]})
    assert folded["0000"] == np.float32(5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_save_then_load_is_the_identity(plan: AdaptationPlan, rank: int, tmp_path: Path) -> None:
    state = random_state(plan, rank)
    save_state(tmp_path / "state.npz", plan, state)
    back_plan, back = load_state(tmp_path / "state.npz")
    assert back_plan == plan
    assert back.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array)


def test_a_damaged_file_gets_one_line(plan: AdaptationPlan, tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    data = bytearray(state_bytes(plan, random_state(plan)))
    for spoilt in (data[: len(data) // 2], b"text", data[:200] + b"\xff" * 50 + data[250:]):
        path.write_bytes(bytes(spoilt))
        with pytest.raises(StateError):
            load_state(path)


def spoil(state: State, key: str, value: object) -> State:
    return {**state, key: value}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("0005/delta", np.full(7, np.nan, "float32"), "finite values, got 7"),
        ("0005/delta", np.full(7, np.inf, "float32"), "finite values, got 7"),
        ("0005/delta", np.zeros(8, "float32"), r"expected \(7,\) float32, got \(8,\) float32"),
        ("0005/delta", np.zeros(7, "float64"), "got .* float64"),
        ("0004/b", np.zeros((3, 7), "float32"), r"'0004/b': expected \(2, 7\)"),
        ("9999/delta", np.zeros(1, "float32"), "unknown .*9999/delta"),
    ],
)
def test_what_is_wrong_is_named(
    plan: AdaptationPlan, key: str, value: np.ndarray, words: str
) -> None:
    with pytest.raises(StateError, match=words):
        check_state(plan, spoil(random_state(plan), key, value))


def test_missing_arrays_and_too_high_ranks_are_named(plan: AdaptationPlan) -> None:
    state = random_state(plan)
    del state["0005/delta"]
    with pytest.raises(StateError, match=r"missing \['0005/delta'\]"):
        check_state(plan, state)
    with pytest.raises(StateError, match="rank: expected at most 4, got 5"):
        check_state(plan, random_state(plan, 5))


def test_fold_names_a_base_that_does_not_fit(
    plan: AdaptationPlan, weights: dict[str, np.ndarray]
) -> None:
    weights["0004"] = weights["0004"].T
    with pytest.raises(StateError, match=r"weight '0004': the plan expects shape \(6, 7\)"):
        fold(weights, plan, initial_state(plan, 0))


def test_folding_needs_no_tensorflow() -> None:
    code = (
        "import sys; import dafne_federated.core.state, dafne_federated.core.model_file; "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'keras', 'torch', 'dafne_dl')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
