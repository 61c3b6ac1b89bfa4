"""Robust rules see what dense arithmetic sees, and bear as many bad sites as they say."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, kernel_update
from dafne_federated.core.strategy_table import ROBUST_TABLE
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.outliers import update_norm
from dafne_federated.strategies.robust import ROBUST_RULES, update_gram

Make = Callable[..., State]
ANY = pytest.mark.parametrize("name", ROBUST_RULES)


def dense(plan: AdaptationPlan, state: State) -> np.ndarray:
    """Return everything that an update changes as one vector."""
    parts = [
        plan.scale * kernel_update(t, state[f"{t.key}/a"], state[f"{t.key}/b"])
        if t.low_rank
        else state[f"{t.key}/delta"]
        for t in plan.targets
    ]
    return np.concatenate([part.ravel() for part in parts])


@pytest.fixture
def good(make_state: Make) -> list[Update]:
    """Six sites that differ a little, with cases from 1 to 6."""
    middle, found = make_state(0), []
    for number in range(6):
        noise = make_state(10 + number)
        state = {key: value + np.float32(0.1) * noise[key] for key, value in middle.items()}
        found.append(Update(f"site {number}", state, number + 1))
    return found


def bad_update(make_state: Make, site: str = "bad", cases: int = 3) -> Update:
    return Update(site, {k: v * np.float32(8) for k, v in make_state(77).items()}, cases)


def test_the_table_and_the_rules_have_the_same_rows() -> None:
    assert list(ROBUST_TABLE) == list(ROBUST_RULES)


def test_inner_products_are_those_of_the_dense_updates(
    small_plan: AdaptationPlan, make_state: Make
) -> None:
    updates = [Update(f"site {rank}", make_state(rank, rank), 1) for rank in (1, 2, 5)]
    vectors = np.stack([dense(small_plan, update.state) for update in updates])
    np.testing.assert_allclose(update_gram(small_plan, updates), vectors @ vectors.T, rtol=1e-5)


@ANY
def test_equal_updates_stay_as_they_are(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    same = [Update(f"site {i}", make_state(0), 1) for i in range(5)]
    chosen = ROBUST_RULES[name](small_plan, same, 1)
    result = STRATEGIES["product"](small_plan, chosen)
    np.testing.assert_allclose(
        dense(small_plan, result.state), dense(small_plan, same[0].state), atol=1e-5
    )


@ANY
def test_the_order_of_updates_does_not_matter_by_a_bit(
    name: str, small_plan: AdaptationPlan, good: list[Update]
) -> None:
    states = []
    for updates in (good, good[::-1]):
        chosen = ROBUST_RULES[name](small_plan, updates, 1)
        states.append(STRATEGIES["product"](small_plan, chosen).state)
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


def test_clipping_turns_none_and_leaves_none_above_the_median(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make
) -> None:
    updates = [*good, bad_update(make_state)]
    norms = [update_norm(small_plan, update.state) for update in updates]
    bound = np.median(norms)
    for before, after in zip(updates, ROBUST_RULES["clipped"](small_plan, updates, 1), strict=True):
        one, two = dense(small_plan, before.state), dense(small_plan, after.state)
        assert np.linalg.norm(two) <= bound * (1 + 1e-6)
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        assert cosine == pytest.approx(1, abs=1e-6)
        assert after is before or np.linalg.norm(one) > bound


def test_krum_takes_one_good_update_and_multi_krum_all_of_them(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make
) -> None:
    # Two that agree with each other: to count neighbours alone is not enough.
    bad = [bad_update(make_state, site) for site in ("bad 1", "bad 2")]
    names = {update.site for update in good}
    (one,) = ROBUST_RULES["krum"](small_plan, [*bad, *good], 2)
    assert one.site in names
    assert {u.site for u in ROBUST_RULES["multi-krum"](small_plan, [*bad, *good], 2)} == names


def test_krum_scores_are_sums_of_dense_distances(
    small_plan: AdaptationPlan, good: list[Update]
) -> None:
    vectors = [dense(small_plan, update.state) for update in good]
    scores = [
        sum(sorted(np.sum((v - w) ** 2) for w in vectors if w is not v)[: 6 - 1 - 2])
        for v in vectors
    ]
    (chosen,) = ROBUST_RULES["krum"](small_plan, good, 1)
    assert chosen.site == good[int(np.argmin(scores))].site


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median"])
def test_too_few_updates_are_refused_with_what_they_bear(
    name: str, small_plan: AdaptationPlan, good: list[Update]
) -> None:
    words = r"needs \d+ updates to bear 3 bad sites, got 6, which bear [12]; set bad-sites to"
    with pytest.raises(StateError, match=words):
        ROBUST_RULES[name](small_plan, good, 3)


def test_the_geometric_median_is_the_point_of_least_distance(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make
) -> None:
    updates = [*good, bad_update(make_state)]
    vectors = np.stack([dense(small_plan, update.state) for update in updates])
    shared = ROBUST_RULES["geometric-median"](small_plan, updates, 1)
    shares = {update.site: update.cases * update.share for update in shared}
    weights = np.array([shares[update.site] for update in updates])
    found = weights @ vectors / weights.sum()

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(vectors - point, axis=1).sum())

    generator = np.random.default_rng(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            step = generator.normal(size=found.size)
            assert total(found) < total(found + size * step / np.linalg.norm(step))
    assert total(found) < total(vectors.mean(axis=0))


def test_a_far_update_hardly_moves_the_geometric_median_however_far_it_is(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make
) -> None:
    def middle(bad: Update) -> np.ndarray:
        chosen = ROBUST_RULES["geometric-median"](small_plan, [*good, bad], 1)
        stacked = STRATEGIES["stack"](small_plan.model_copy(update={"max_rank": 16}), chosen)
        return dense(small_plan, stacked.state)

    bad = bad_update(make_state)
    far = replace(bad, state={k: v * np.float32(30) for k, v in bad.state.items()})
    one, two = middle(bad), middle(far)
    assert np.linalg.norm(one - two) < 0.02 * np.linalg.norm(one)


def test_of_two_updates_the_smaller_is_the_bound(
    small_plan: AdaptationPlan, make_state: Make
) -> None:
    small, large = Update("site 0", make_state(0), 1), bad_update(make_state)
    for one, other in ROBUST_RULES["clipped"](small_plan, [small, large], 1), (small, small):
        assert one is small
        norm = update_norm(small_plan, other.state)
        assert norm == pytest.approx(update_norm(small_plan, small.state), rel=1e-5)
