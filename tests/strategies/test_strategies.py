"""Laws that hold for every strategy, and what each promises beyond them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, check_state, kernel_update, state_bytes
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.outliers import update_norm

Make = Callable[..., State]
ANY = pytest.mark.parametrize("name", STRATEGIES)
EXACT = {"product"}  # exact up to the cut to a rank
MIXED_RANKS = {"product"}


def updates(make_state: Make, count: int = 4, ranks: tuple[int | None, ...] = (None,)) -> list[Any]:
    cases = (3, 1, 10, 2, 5)
    cycle = itertools.cycle(ranks)
    return [
        Update(f"site {i}", make_state(i, rank), cases[i])
        for i, rank in zip(range(count), cycle, strict=False)
    ]


def products(plan: AdaptationPlan, state: State) -> dict[str, np.ndarray]:
    return {
        t.key: kernel_update(t, state[f"{t.key}/a"], state[f"{t.key}/b"])
        for t in plan.targets
        if t.kind != "delta"
    }


def mean_product(plan: AdaptationPlan, ups: list[Any]) -> dict[str, np.ndarray]:
    total = sum(u.cases for u in ups)
    parts = [(u.cases / total, products(plan, u.state)) for u in ups]
    return {key: sum(w * p[key] for w, p in parts) for key in parts[0][1]}


@ANY
def test_the_result_is_a_state_of_the_plan(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    check_state(small_plan, STRATEGIES[name](small_plan, updates(make_state)).state)


@ANY
def test_one_site_is_a_fixed_point(name: str, small_plan: AdaptationPlan, make_state: Make) -> None:
    (only,) = updates(make_state, 1)
    result = STRATEGIES[name](small_plan, [only])
    assert state_bytes(small_plan, result.state) == state_bytes(small_plan, only.state)
    assert result.error < 1e-6


@ANY
def test_equal_sites_give_that_site(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    same = [Update(f"site {i}", make_state(0), i + 1) for i in range(3)]
    result = STRATEGIES[name](small_plan, same)
    for key, want in products(small_plan, same[0].state).items():
        np.testing.assert_allclose(products(small_plan, result.state)[key], want, atol=1e-5)
    np.testing.assert_allclose(result.state["0006/delta"], same[0].state["0006/delta"], rtol=1e-6)
    assert result.error < 1e-6


@ANY
def test_order_of_arrival_does_not_matter_bit_for_bit(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates(make_state)
    results = {
        state_bytes(small_plan, STRATEGIES[name](small_plan, list(order)).state)
        for order in itertools.permutations(ups)
    }
    assert len(results) == 1


@ANY
def test_only_the_proportion_of_cases_counts(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates(make_state)
    more = [Update(u.site, u.state, u.cases * 7) for u in ups]
    one, two = (STRATEGIES[name](small_plan, u).state for u in (ups, more))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-5)


@ANY
def test_dense_parts_are_the_weighted_mean(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates(make_state)
    want = np.average(
        [u.state["0006/delta"].astype(np.float64) for u in ups],
        axis=0,
        weights=[u.cases for u in ups],
    )
    np.testing.assert_allclose(
        STRATEGIES[name](small_plan, ups).state["0006/delta"], want, atol=1e-6
    )


@ANY
def test_the_printed_error_is_the_true_one(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates(make_state)
    result = STRATEGIES[name](small_plan, ups)
    want, got = mean_product(small_plan, ups), products(small_plan, result.state)
    missed = sum(np.sum((want[key] - got[key]) ** 2) for key in want)
    size = sum(np.sum(want[key] ** 2) for key in want)
    assert result.error == pytest.approx(np.sqrt(missed / size), rel=1e-4)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_where_the_rank_suffices(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    # Two sites of rank 1 need rank 2, which is the plan's.
    ups = updates(make_state, 2, (1,))
    result = STRATEGIES[name](small_plan, ups)
    want, got = mean_product(small_plan, ups), products(small_plan, result.state)
    for key in want:
        assert np.linalg.norm(want[key] - got[key]) <= 1e-6 * np.linalg.norm(want[key])
    assert result.error < 1e-6


@pytest.mark.parametrize("name", sorted(EXACT))
def test_best_of_its_rank_otherwise(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates(make_state)
    want = mean_product(small_plan, ups)["0004"]
    got = products(small_plan, STRATEGIES[name](small_plan, ups).state)["0004"]
    left_out = np.linalg.norm(np.linalg.svd(want, compute_uv=False)[small_plan.rank :])
    assert np.linalg.norm(want - got) == pytest.approx(left_out, rel=1e-4)


@ANY
def test_mixed_ranks_are_combined_or_refused_in_words(
    name: str, small_plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates(make_state, 4, (1, 6, 2))
    if name in MIXED_RANKS:
        check_state(small_plan, STRATEGIES[name](small_plan, ups).state)
    else:
        with pytest.raises(StateError, match=r"needs one rank, got \[1, 2, 6\]; take strategy"):
            STRATEGIES[name](small_plan, ups)


def test_factors_is_not_the_mean_of_products(small_plan: AdaptationPlan, make_state: Make) -> None:
    ups = updates(make_state)
    assert STRATEGIES["factors"](small_plan, ups).error > 0.1
    assert STRATEGIES["product"](small_plan, ups).error < STRATEGIES["factors"](
        small_plan, ups
    ).error  # fmt: skip


@ANY
def test_stored_statistics_are_carried_on_bit_for_bit(
    name: str, statistics_plan: AdaptationPlan, make_statistics_state: Make
) -> None:
    fixed = statistics_plan.state_shapes(trained=False)
    sent = make_statistics_state(9)
    sent["0008/delta"][0] = -0.0
    ups = [
        Update(f"site {i}", make_statistics_state(i) | {k: sent[k].copy() for k in fixed}, i + 1)
        for i in range(3)
    ]
    result = STRATEGIES[name](statistics_plan, ups)
    check_state(statistics_plan, result.state)
    for key in fixed:
        assert result.state[key].tobytes() == sent[key].tobytes()


def test_stored_statistics_do_not_count_as_an_update(
    statistics_plan: AdaptationPlan, make_statistics_state: Make
) -> None:
    state = make_statistics_state(0)
    other = state | {"0008/delta": 1e6 * np.ones(5, np.float32)}
    assert update_norm(statistics_plan, state) == update_norm(statistics_plan, other) > 0
