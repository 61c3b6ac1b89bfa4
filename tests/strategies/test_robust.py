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
from dafne_federated.strategies.clipping import change_norm
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


@pytest.fixture
def sent(make_state: Make) -> State:
    """What the sites were sent: near to what they send back."""
    noise = make_state(30)
    return {key: value + np.float32(0.1) * noise[key] for key, value in make_state(0).items()}


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
    name: str, small_plan: AdaptationPlan, make_state: Make, sent: State
) -> None:
    same = [Update(f"site {i}", make_state(0), 1) for i in range(5)]
    chosen = ROBUST_RULES[name](small_plan, same, 1, sent)
    result = STRATEGIES["product"](small_plan, chosen)
    np.testing.assert_allclose(
        dense(small_plan, result.state), dense(small_plan, same[0].state), atol=1e-5
    )


@ANY
def test_the_order_of_updates_does_not_matter_by_a_bit(
    name: str, small_plan: AdaptationPlan, good: list[Update], sent: State
) -> None:
    states = []
    for updates in (good, good[::-1]):
        chosen = ROBUST_RULES[name](small_plan, updates, 1, sent)
        states.append(STRATEGIES["product"](small_plan, chosen).state)
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


def test_clipping_bounds_the_change_of_a_round_and_turns_none(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make, sent: State
) -> None:
    updates = [*good, bad_update(make_state)]
    start = dense(small_plan, sent)
    changes = {u.site: dense(small_plan, u.state) - start for u in updates}
    norms = {site: np.linalg.norm(change) for site, change in changes.items()}
    for update in updates:
        norm = change_norm(small_plan, update.state, sent)
        assert norm == pytest.approx(norms[update.site], rel=1e-5)
    bound = np.median(list(norms.values()))
    want = sum(u.cases * changes[u.site] * min(1, bound / norms[u.site]) for u in updates)
    chosen = ROBUST_RULES["clipped"](small_plan, updates, 1, sent)
    shares = {u.site: u.share for u in chosen}
    assert sum(shares[u.site] < 1 for u in updates) == 3
    wide = small_plan.model_copy(update={"max_rank": 64})
    found = dense(small_plan, STRATEGIES["stack"](wide, chosen).state) - start
    np.testing.assert_allclose(found, want / sum(u.cases for u in updates), atol=1e-5)


def test_a_site_far_along_in_an_old_state_is_not_clipped_for_it(
    small_plan: AdaptationPlan, sent: State
) -> None:
    """Late in a run all updates are large and all changes small: only the changes count."""
    sizes = {"site 0": 0.01, "site 1": 0.02, "site 2": 0.5}
    updates = [
        Update(name, sent | {"0006/delta": sent["0006/delta"] + np.float32(size / np.sqrt(12))}, 1)
        for name, size in sizes.items()
    ]
    chosen = ROBUST_RULES["clipped"](small_plan, updates, 1, sent)
    shares = {update.site: update.share for update in chosen}
    rest = pytest.approx(0.96, abs=1e-4)
    assert shares == {"site 0": 1, "site 1": 1, "site 2": pytest.approx(0.04, abs=1e-4), "": rest}


@pytest.mark.parametrize("strategy", ["frozen-a", "alternating"])
def test_clipping_leaves_a_factor_that_stood_still(
    strategy: str, small_plan: AdaptationPlan, good: list[Update], make_state: Make, sent: State
) -> None:
    held = {key: value for key, value in sent.items() if key.endswith("/a")}
    updates = [
        replace(update, state=update.state | held) for update in [*good, bad_update(make_state)]
    ]
    chosen = ROBUST_RULES["clipped"](small_plan, updates, 1, sent)
    assert chosen[-1].state is sent
    result = STRATEGIES[strategy](small_plan, chosen)
    assert all(np.array_equal(result.state[key], value) for key, value in held.items())


def test_clipping_makes_no_arrays_of_its_own(
    small_plan: AdaptationPlan, good: list[Update], sent: State
) -> None:
    chosen = ROBUST_RULES["clipped"](small_plan, good, 1, sent)
    states = {update.site: update.state for update in good}
    assert len(chosen) == len(good) + 1
    assert all(update.state is states.get(update.site, sent) for update in chosen)


def test_krum_takes_one_good_update_and_multi_krum_all_of_them(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make, sent: State
) -> None:
    # Two that agree with each other: to count neighbours alone is not enough.
    bad = [bad_update(make_state, site) for site in ("bad 1", "bad 2")]
    names = {update.site for update in good}
    (one,) = ROBUST_RULES["krum"](small_plan, [*bad, *good], 2, sent)
    assert one.site in names
    assert {u.site for u in ROBUST_RULES["multi-krum"](small_plan, [*bad, *good], 2, sent)} == names


def test_krum_scores_are_sums_of_dense_distances(
    small_plan: AdaptationPlan, good: list[Update], sent: State
) -> None:
    vectors = [dense(small_plan, update.state) for update in good]
    scores = [
        sum(sorted(np.sum((v - w) ** 2) for w in vectors if w is not v)[: 6 - 1 - 2])
        for v in vectors
    ]
    (chosen,) = ROBUST_RULES["krum"](small_plan, good, 1, sent)
    assert chosen.site == good[int(np.argmin(scores))].site


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median"])
def test_too_few_updates_are_refused_with_what_they_bear(
    name: str, small_plan: AdaptationPlan, good: list[Update], sent: State
) -> None:
    words = r"needs \d+ updates to bear 3 bad sites, got 6, which bear [12]; set bad-sites to"
    with pytest.raises(StateError, match=words):
        ROBUST_RULES[name](small_plan, good, 3, sent)


def test_the_geometric_median_is_the_point_of_least_distance(
    small_plan: AdaptationPlan, good: list[Update], make_state: Make, sent: State
) -> None:
    updates = [*good, bad_update(make_state)]
    vectors = np.stack([dense(small_plan, update.state) for update in updates])
    shared = ROBUST_RULES["geometric-median"](small_plan, updates, 1, sent)
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
    small_plan: AdaptationPlan, good: list[Update], make_state: Make, sent: State
) -> None:
    def middle(bad: Update) -> np.ndarray:
        chosen = ROBUST_RULES["geometric-median"](small_plan, [*good, bad], 1, sent)
        stacked = STRATEGIES["stack"](small_plan.model_copy(update={"max_rank": 16}), chosen)
        return dense(small_plan, stacked.state)

    bad = bad_update(make_state)
    far = replace(bad, state={k: v * np.float32(30) for k, v in bad.state.items()})
    one, two = middle(bad), middle(far)
    assert np.linalg.norm(one - two) < 0.02 * np.linalg.norm(one)


def test_of_two_updates_the_smaller_change_is_the_bound(
    small_plan: AdaptationPlan, make_state: Make, sent: State
) -> None:
    small, large = Update("site 0", make_state(0), 1), bad_update(make_state)
    chosen = {u.site: u for u in ROBUST_RULES["clipped"](small_plan, [small, large], 1, sent)}
    assert chosen["site 0"] == small
    bound = change_norm(small_plan, small.state, sent)
    clip = chosen["bad"].share * change_norm(small_plan, large.state, sent)
    assert clip == pytest.approx(bound, rel=1e-5)
