"""Laws that hold for every strategy, and what each promises beyond them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, check_state, kernel_update
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Aggregate, Update
from dafne_federated.strategies.outliers import update_norm

Make = Callable[..., State]
ANY = pytest.mark.parametrize("name", STRATEGIES)
# What the mean of products needs of a plan of rank 2: more directions than the result may have.
CUT = {"product", "stack", "global+local"}
EXACT = {"frozen-a", "alternating", "product", "stack", "global+local"}  # but for that cut
CASES = (3, 1, 10, 2, 5)


class Round:
    """Updates as they come in under the rules of a strategy, and what becomes of them."""

    def __init__(self, name: str, plan: AdaptationPlan, make_state: Make) -> None:
        self.name, self.rules, self._make = name, STRATEGY_TABLE[name], make_state
        if self.rules.pairs == "never":
            dense = tuple(t for t in plan.targets if not t.low_rank)
            plan = plan.model_copy(update={"targets": dense})
        self.plan = plan

    def state(self, seed: int, rank: int | None = None) -> State:
        """Return what a site sends, completed with the factors that stood still."""
        state, held = self._make(seed, rank), self._make(99, rank)
        keys = self.plan.state_shapes(rank).keys()
        return {
            key: held[key] if key[-1] in self.rules.odd.held and key[-2] == "/" else value
            for key, value in state.items()
            if key in keys and not (key[-1] in self.rules.odd.personal and key[-2] == "/")
        }

    def updates(self, count: int = 4, ranks: Sequence[int | None] = (None,)) -> list[Update]:
        cycle = itertools.cycle(ranks)
        return [
            Update(f"site {i}", self.state(i, rank), CASES[i])
            for i, rank in zip(range(count), cycle, strict=False)
        ]

    def combine(self, updates: Sequence[Update]) -> Aggregate:
        return STRATEGIES[self.name](self.plan, updates)

    def products(self, state: Any) -> dict[str, np.ndarray]:
        return {
            t.key: kernel_update(t, state[f"{t.key}/a"], state[f"{t.key}/b"])
            for t in self.plan.targets
            if t.low_rank and f"{t.key}/b" in state
        }

    def mean_product(self, updates: Sequence[Update]) -> dict[str, np.ndarray]:
        total = sum(u.cases for u in updates)
        parts = [(u.cases / total, self.products(u.state)) for u in updates]
        return {key: sum(w * p[key] for w, p in parts) for key in parts[0][1]}


MakeRound = Callable[[str], Round]


@pytest.fixture
def make_round(small_plan: AdaptationPlan, make_state: Make) -> MakeRound:
    return lambda name: Round(name, small_plan, make_state)


def same_bits(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_the_table_of_rules_and_that_of_functions_have_the_same_rows() -> None:
    assert list(STRATEGY_TABLE) == list(STRATEGIES)


@ANY
def test_the_result_is_a_state_of_the_plan(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    check_state(round_.plan, round_.combine(round_.updates()).state)


@ANY
def test_one_site_is_a_fixed_point(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    (only,) = round_.updates(1)
    result = round_.combine([only])
    assert same_bits({key: result.state[key] for key in only.state}, only.state)
    assert result.error == 0


@ANY
def test_equal_sites_give_that_site(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    same = [Update(f"site {i}", round_.state(0), i + 1) for i in range(3)]
    result = round_.combine(same)
    for key, want in round_.products(same[0].state).items():
        np.testing.assert_allclose(round_.products(result.state)[key], want, atol=1e-5)
    for key, value in same[0].state.items():
        if key[-2:] not in ("/a", "/b"):
            np.testing.assert_array_equal(result.state[key], value)
    assert {a.shape[-1] for key, a in result.state.items() if key.endswith("/a")} <= {2}
    assert result.error < 1e-6


@ANY
def test_order_of_arrival_does_not_matter_bit_for_bit(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    first, *others = (
        round_.combine(list(order)).state for order in itertools.permutations(round_.updates())
    )
    assert all(same_bits(first, other) for other in others)


@ANY
def test_only_the_proportion_of_cases_counts(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    ups = round_.updates()
    more = [Update(u.site, u.state, u.cases * 7) for u in ups]
    less = [Update(u.site, u.state, u.cases, share=0.25) for u in ups]
    one = round_.combine(ups).state
    for other in (more, less):
        two = round_.combine(other).state
        for key in one:
            np.testing.assert_allclose(one[key], two[key], atol=1e-5)


@ANY
def test_whole_arrays_are_the_weighted_mean(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    ups = round_.updates()
    values = [u.state["0006/delta"].astype(np.float64) for u in ups]
    want = np.average(values, axis=0, weights=[u.cases for u in ups])
    np.testing.assert_allclose(round_.combine(ups).state["0006/delta"], want, atol=1e-6)


@ANY
def test_the_printed_error_is_the_true_one(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    ups = round_.updates()
    result = round_.combine(ups)
    want, got = round_.mean_product(ups), round_.products(result.state)
    missed = sum(np.sum((want[key] - got[key]) ** 2) for key in want)
    size = sum(np.sum(want[key] ** 2) for key in want)
    true = np.sqrt(missed / size) if size else 0.0
    assert result.error == pytest.approx(true, rel=1e-4, abs=2e-7)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_where_the_rank_suffices(name: str, make_round: MakeRound) -> None:
    # Two sites of rank 1 need rank 2, which is the plan's; a common factor needs no more.
    round_ = make_round(name)
    ups = round_.updates(2, (1,))
    result = round_.combine(ups)
    want, got = round_.mean_product(ups), round_.products(result.state)
    for key in want:
        assert np.linalg.norm(want[key] - got[key]) <= 1e-6 * np.linalg.norm(want[key])
    assert result.error < 1e-6


@pytest.mark.parametrize("name", sorted(CUT))
def test_best_of_its_rank_otherwise(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    ups = round_.updates()
    want = round_.mean_product(ups)["0004"]
    result = round_.combine(ups)
    rank = result.state["0004/a"].shape[-1]
    assert rank == (round_.plan.max_rank if round_.rules.grows else round_.plan.rank)
    left_out = np.linalg.norm(np.linalg.svd(want, compute_uv=False)[rank:])
    missed = np.linalg.norm(want - round_.products(result.state)["0004"])
    assert missed == pytest.approx(left_out, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", sorted(CUT))
def test_signs_do_not_depend_on_those_of_the_sites(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    ups = round_.updates()
    turned = [
        Update(
            u.site, {k: -v if k[-2:] in ("/a", "/b") else v for k, v in u.state.items()}, u.cases
        )
        for u in ups
    ]
    assert same_bits(round_.combine(ups).state, round_.combine(turned).state)


@ANY
def test_mixed_ranks_are_combined_or_refused_in_words(name: str, make_round: MakeRound) -> None:
    round_ = make_round(name)
    ups = round_.updates(3, (1, 6, 2))
    if round_.rules.ranks:
        result = round_.combine(ups)
        check_state(round_.plan, result.state)
        # A state that does not grow with the sites keeps the rank of the plan.
        assert result.state["0004/a"].shape[-1] == (6 if round_.rules.grows else round_.plan.rank)
    elif name == "factors":
        with pytest.raises(StateError, match=r"needs one rank, got \[1, 2, 6\]; take strategy"):
            round_.combine(ups)
    elif name in ("frozen-a", "alternating"):
        with pytest.raises(StateError, match="to be the same at all sites, got different ones"):
            round_.combine(ups)


def test_factors_is_not_the_mean_of_products(make_round: MakeRound) -> None:
    baseline, better = make_round("factors"), make_round("product")
    ups = baseline.updates()
    assert baseline.combine(ups).error > 0.1
    assert better.combine(ups).error < baseline.combine(ups).error


def test_fedavg_refuses_pairs_and_names_the_way_out(
    small_plan: AdaptationPlan, make_state: Make
) -> None:
    only = Update("site", make_state(0), 1)
    with pytest.raises(StateError, match=r"got low-rank pairs for .*; take strategy 'product'"):
        STRATEGIES["fedavg"](small_plan, [only])


@pytest.mark.parametrize("common", ["a", "b"])
def test_alternating_is_exact_whichever_factor_stood_still(
    common: str, make_round: MakeRound, make_state: Make
) -> None:
    round_ = make_round("alternating")
    held = {k: v for k, v in make_state(99).items() if k.endswith(f"/{common}")}
    ups = [Update(f"site {i}", make_state(i) | held, CASES[i]) for i in range(4)]
    result = round_.combine(ups)
    assert all(np.array_equal(result.state[key], value) for key, value in held.items())
    want, got = round_.mean_product(ups), round_.products(result.state)
    for key in want:
        assert np.linalg.norm(want[key] - got[key]) <= 1e-6 * np.linalg.norm(want[key])


def test_stack_grows_to_what_the_sites_need_and_no_further(make_round: MakeRound) -> None:
    round_ = make_round("stack")
    three = round_.combine(round_.updates(3))  # three sites of rank 2 fill the bound of 6
    assert (three.state["0000/a"].shape[-1], three.error < 1e-6) == (6, True)
    four = round_.combine(round_.updates(4))
    assert (four.state["0000/a"].shape[-1], four.error > 0.01) == (6, True)


def test_shared_a_never_needs_nor_makes_a_b(make_round: MakeRound) -> None:
    round_ = make_round("shared-a")
    ups = round_.updates()
    assert not any(key.endswith("/b") for u in ups for key in u.state)
    state = round_.combine(ups).state
    assert not any(state[key].any() for key in state if key.endswith("/b"))


@ANY
def test_stored_statistics_are_carried_on_bit_for_bit(
    name: str, statistics_plan: AdaptationPlan, make_statistics_state: Make
) -> None:
    round_ = Round(name, statistics_plan, make_statistics_state)
    fixed = statistics_plan.state_shapes(trained=False)
    sent = make_statistics_state(9)
    sent["0008/delta"][:2] = -0.0, 1e-41
    ups = [
        Update(u.site, u.state | {key: sent[key].copy() for key in fixed}, u.cases)
        for u in round_.updates(3)
    ]
    result = round_.combine(ups)
    check_state(round_.plan, result.state)
    for key in fixed:
        assert result.state[key].tobytes() == sent[key].tobytes()


def test_stored_statistics_do_not_count_as_an_update(
    statistics_plan: AdaptationPlan, make_statistics_state: Make
) -> None:
    state = make_statistics_state(0)
    other = state | {"0008/delta": 1e6 * np.ones(5, np.float32)}
    assert update_norm(statistics_plan, state) == update_norm(statistics_plan, other) > 0
