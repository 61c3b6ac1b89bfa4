"""A cut is the best of its rank, and nothing that it leaves out is lost or weighed down."""

from collections.abc import Callable

import numpy as np
import pytest

from dafne_federated.core.low_rank import dense_product
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.rank_cut import at_rank, completed, site_ranks
from dafne_federated.core.state import State, check_state, initial_state, state_rank
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update

Make = Callable[..., State]


def products(plan: AdaptationPlan, state: State) -> dict[str, np.ndarray]:
    keys = [target.key for target in plan.targets if target.low_rank]
    return {key: dense_product((state[f"{key}/a"], state[f"{key}/b"])) for key in keys}


def test_at_its_own_rank_a_state_is_itself(small_plan: AdaptationPlan, make_state: Make) -> None:
    state = make_state(0)
    cut = at_rank(small_plan, state, 2, seed=1)
    assert cut.whole
    assert all(cut.state[key] is state[key] for key in state)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_is_the_best_of_its_rank_and_its_rest_is_the_rest(
    small_plan: AdaptationPlan, make_state: Make, rank: int
) -> None:
    state = make_state(0, 6)
    cut = at_rank(small_plan, state, rank, seed=1)
    check_state(small_plan, cut.state)
    assert (state_rank(small_plan, cut.state), cut.whole) == (rank, False)
    both = products(small_plan, completed(cut.state, cut.rest))
    for key, want in products(small_plan, state).items():
        left_out = np.linalg.norm(np.linalg.svd(want, compute_uv=False)[rank:])
        missed = np.linalg.norm(want - products(small_plan, cut.state)[key])
        assert missed == pytest.approx(left_out, rel=1e-4)
        np.testing.assert_allclose(both[key], want, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_every_direction_can_move_and_none_changes_a_product(
    small_plan: AdaptationPlan, rank: int
) -> None:
    start = initial_state(small_plan, 0)  # b is zero: there is nothing to keep in any cut
    cut = at_rank(small_plan, start, rank, seed=1)
    assert cut.whole
    for key, value in cut.state.items():
        if key.endswith("/a"):
            assert value.reshape(-1, rank).any(axis=0).all()
            assert np.abs(value).max() < 2
    assert all(not product.any() for product in products(small_plan, cut.state).values())
    again = at_rank(small_plan, start, rank, seed=1).state
    other = at_rank(small_plan, start, rank, seed=2).state
    assert all(np.array_equal(cut.state[key], again[key]) for key in again)
    assert rank == 2 or any((cut.state[key] != other[key]).any() for key in other)


@pytest.mark.parametrize("strategy", ["product", "stack"])
def test_a_site_of_small_rank_that_changes_nothing_pulls_nothing_down(
    small_plan: AdaptationPlan, make_state: Make, strategy: str
) -> None:
    state, plan = make_state(0, 6), small_plan.model_copy(update={"rank": 6})
    updates = []
    for site, rank, cases in (("large", 6, 1), ("small", 1, 9)):
        cut = at_rank(small_plan, state, rank, seed=1)
        updates.append(Update(site, completed(cut.state, cut.rest), cases))
    result = STRATEGIES[strategy](plan, updates)
    assert result.error < 1e-6
    for key, want in products(small_plan, state).items():
        np.testing.assert_allclose(products(small_plan, result.state)[key], want, atol=1e-4)
    # Without the rest, nine tenths of all but the first direction would be gone.
    cut_only = Update("small", at_rank(small_plan, state, 1, seed=1).state, 9)
    diluted = products(small_plan, STRATEGIES[strategy](plan, [updates[0], cut_only]).state)
    want = products(small_plan, state)["0004"]
    assert np.linalg.norm(diluted["0004"] - want) > 0.3 * np.linalg.norm(want)


def test_a_site_without_a_rank_takes_that_of_the_run(
    small_plan: AdaptationPlan, make_state: Make
) -> None:
    chosen = {"a": None, "b": 1, "c": 6}
    state = make_state(0, 4)
    assert site_ranks(small_plan, state, chosen, grows=False) == {"a": 2, "b": 1, "c": 6}
    assert site_ranks(small_plan, state, chosen, grows=True) == {"a": 4, "b": 1, "c": 6}
