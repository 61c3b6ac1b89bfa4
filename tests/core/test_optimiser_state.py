"""What Adam knows follows its factors into another basis, and comes back from disk as it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import StateError
from dafne_federated.core.low_rank import dense_product
from dafne_federated.core.optimiser_state import (
    AdamState,
    carried_over,
    load_optimiser,
    save_optimiser,
)
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, state_rank

Make = Callable[..., State]
KEYS = ("0000", "0002", "0004")  # the pairs of the plan: conv, conv-transpose, dense


@pytest.fixture
def kept(make_state: Make) -> AdamState:
    second = {key: np.square(value) for key, value in make_state(2).items()}
    factors = {key: value for key, value in make_state(3).items() if key[-2:] in ("/a", "/b")}
    return AdamState(7, make_state(1), second, factors)


def turned(state: State, turn: np.ndarray) -> State:
    """Return the same products from factors in another basis: ``a T`` and ``T^-1 b``."""
    back, new = np.linalg.inv(turn), dict(state)
    for key in KEYS:
        new[f"{key}/a"] = (state[f"{key}/a"] @ turn).astype("f4")
        new[f"{key}/b"] = np.tensordot(back, state[f"{key}/b"], 1).astype("f4")
    return new


def test_in_the_same_basis_no_bit_moves(kept: AdamState, make_state: Make) -> None:
    found = carried_over(kept, make_state(9) | kept.factors)
    for part in ("first", "second", "factors"):
        for key, value in getattr(kept, part).items():
            assert getattr(found, part)[key].tobytes() == value.tobytes()
    assert found.steps == 7


@pytest.mark.parametrize(
    "turn", [np.array([[0, -1], [1, 0]]), np.array([[0.6, 0.8], [-0.8, 0.6]])], ids=["swap", "turn"]
)
def test_after_a_rotation_a_step_along_the_moments_does_the_same(
    kept: AdamState, make_state: Make, turn: np.ndarray
) -> None:
    """Momentum steps of both factors, old and new basis, end in the same products."""
    old = make_state(9) | kept.factors
    new = turned(old, turn)
    moved = carried_over(kept, new)
    for key in KEYS:
        after = [
            dense_product(
                tuple(state[n] - np.float32(0.1) * adam.first[n] for n in (f"{key}/a", f"{key}/b"))
            )
            for state, adam in ((old, kept), (new, moved))
        ]
        np.testing.assert_allclose(after[1], after[0], atol=2e-5)
        assert np.abs(moved.first[f"{key}/b"] - kept.first[f"{key}/b"]).max() > 0.1
    np.testing.assert_array_equal(moved.first["0006/delta"], kept.first["0006/delta"])


def test_in_any_basis_the_moments_are_those_measured_there(make_state: Make) -> None:
    """Running means of ``G b'`` and ``a' G`` change as if they had been measured in the new one."""
    turn = np.array([[2.0, 0.5], [-0.3, 0.4]])
    old = make_state(3)
    new = turned(old, turn)
    gradient = np.random.default_rng(0).normal(size=(6, 7))

    def measured(state: State) -> State:
        first = make_state(1)
        first["0004/a"] = (gradient @ state["0004/b"].T).astype("f4")
        first["0004/b"] = (state["0004/a"].T @ gradient).astype("f4")
        return first

    factors = {key: value for key, value in old.items() if key[-2:] in ("/a", "/b")}
    found = carried_over(AdamState(1, measured(old), make_state(2), factors), new)
    for key in ("0004/a", "0004/b"):
        np.testing.assert_allclose(found.first[key], measured(new)[key], rtol=1e-4, atol=1e-4)


def test_second_moments_are_permuted_exactly_and_never_negative(
    kept: AdamState, make_state: Make
) -> None:
    old = make_state(9) | kept.factors
    swapped = carried_over(kept, turned(old, np.array([[0.0, -1.0], [1.0, 0.0]])))
    np.testing.assert_allclose(swapped.second["0004/b"], kept.second["0004/b"][::-1], rtol=1e-5)
    np.testing.assert_allclose(swapped.second["0000/a"], kept.second["0000/a"][..., ::-1], 1e-5)
    other = carried_over(kept, make_state(5))
    assert all((value >= 0).all() for value in other.second.values())


def test_new_directions_begin_without_moments(
    kept: AdamState, make_state: Make, small_plan: AdaptationPlan
) -> None:
    new = make_state(9, 3) | {"0006/delta": make_state(9)["0006/delta"]}
    for key in KEYS:  # the old directions in another order, and one that they do not span
        for name, axis in ((f"{key}/a", -1), (f"{key}/b", 0)):
            old = np.moveaxis(kept.factors[name], axis, -1)
            flat = old.reshape(-1, 2)
            normal = np.linalg.qr(np.column_stack([flat, np.arange(len(flat))]))[0][:, 2]
            three = np.stack([old[..., 1], old[..., 0], normal.reshape(old.shape[:-1])], -1)
            new[name] = np.moveaxis(three, -1, axis).astype("f4")
    assert state_rank(small_plan, new) == 3
    found = carried_over(kept, new)
    for key in KEYS:
        want = kept.first[f"{key}/b"][::-1]
        np.testing.assert_allclose(found.first[f"{key}/b"][:2], want, atol=1e-5)
        np.testing.assert_allclose(found.first[f"{key}/b"][2], 0, atol=1e-5)
        np.testing.assert_allclose(found.second[f"{key}/a"][..., 2], 0, atol=1e-8)


def test_what_was_kept_comes_back_whole_or_not_at_all(kept: AdamState, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "round-0001.npz"
    save_optimiser(path, kept)
    found = load_optimiser(path)
    assert found.steps == 7
    for part in ("first", "second", "factors"):
        one, other = getattr(kept, part), getattr(found, part)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-40], whole[:300] + b"xxxx" + whole[304:]):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match="not what an optimiser knew"):
            load_optimiser(path)
    save_optimiser(path, replace(kept, second={}))
    with pytest.raises(StateError, match="expected first and second moments"):
        load_optimiser(path)


def test_moments_of_another_plan_are_refused(kept: AdamState, make_state: Make) -> None:
    state = make_state(9)
    for wrong in (
        {key: value for key, value in state.items() if key != "0004/a"},
        state | {"0006/delta": np.zeros(5, np.float32)},
        state | {"0004/a": np.zeros((9, 2), np.float32)},
    ):
        with pytest.raises(StateError, match="optimiser: expected the moments of this plan"):
            carried_over(kept, wrong)
