"""Rounds of every strategy move and send what its row says, at any rank, beside all the rest."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes, state_rank, without_factors
from dafne_federated.core.strategy_table import COORDINATE_RULES, STRATEGY_TABLE, round_rule
from dafne_federated.core.wire import RoundReply
from dafne_federated.core.wire_arrays import rounded
from dafne_federated.server.release import choose_round
from dafne_federated.server.rounds import first_state, run_rounds
from dafne_federated.server.statistics import with_statistics
from tests.server.conftest import BOTH, changed, grid_of, stop_in

Make = Callable[..., Any]
WITH_PAIRS = [name for name, rules in STRATEGY_TABLE.items() if rules.pairs != "never"]


@pytest.mark.parametrize("strategy", WITH_PAIRS)
def test_only_what_the_strategy_moves_moves_and_travels(
    new_run: Make, make_grid: Make, strategy: str
) -> None:
    folder = new_run(strategy=strategy)
    run_rounds(make_grid(folder), folder)
    plan, lines = folder.plan(), folder.rounds()
    before = first_state(folder.info(), plan)
    for line in lines[:3]:
        rule, after = round_rule(strategy, line.round), folder.state_after(line.round)
        for key, value in after.items():
            if key.endswith("/delta") or key[-1] in rule.sent or rule.sent == "both":
                assert value.shape != before[key].shape or (value != before[key]).any()
            else:
                np.testing.assert_array_equal(value, before[key])
        up = sum(v.nbytes for v in without_factors(before, rule.absent).values())
        for site in line.sites.values():
            assert up < site.bytes_up < up + 8000
        before = after


@pytest.mark.parametrize("strategy", ["product", "stack"])
def test_each_site_gets_its_own_rank_back(new_run: Make, make_grid: Make, strategy: str) -> None:
    folder = new_run(strategy=strategy, max_rank=16)
    grid = make_grid(folder)
    small, usual, large = grid.sites.values()
    small.rank, large.rank = 2, 16
    run_rounds(grid, folder)
    whole = state_rank(folder.plan(), folder.state_after(3))
    # That of the plan; or no layer has more than 8 directions.
    assert whole == {"product": 2, "stack": 8}[strategy]
    assert small.ranks == [2, 2, 2, whole]  # the last message evaluates the state itself
    assert large.ranks == [16, 16, 16, whole]
    assert usual.ranks == ([2, 2, 2, whole] if strategy == "product" else [2, 8, 8, whole])
    lines = folder.rounds()
    whole_in = {"product": [True] * 4, "stack": [True, False, False, True]}
    assert [line.whole for line in lines] == whole_in[strategy]
    number, reason, _ = choose_round(lines, folder.info().settings)
    assert (number, "no label lost" in reason) == (3, True)  # the one that all measured whole


def test_a_site_of_larger_rank_leaves_all_others_the_state_whole(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(max_rank=16, sites_per_round=0)
    grid = make_grid(folder)
    *_, large = grid.sites.values()
    large.rank = 16

    def best_in_the_middle(message: Any, content: Any) -> Any:
        if message.metadata.group_id == "3":
            more = changed(folder.plan(), 0.9)
            reply = RoundReply.from_record(content).model_copy(update=more)
            numbers = reply.to_record().metric_records["metrics"]
            content.metric_records["metrics"] = numbers
        return content

    for site in grid.sites.values():
        site.change = best_in_the_middle
    run_rounds(grid, folder)
    assert [line.whole for line in folder.rounds()] == [True] * 4
    assert choose_round(folder.rounds(), folder.info().settings)[0] == 2
    error = folder.rounds()[0].aggregation_error
    assert error is not None
    assert error > 0


def test_a_rank_that_does_not_fit_is_declined_in_words(new_run: Make, make_grid: Make) -> None:
    for strategy, rank, words in (
        ("factors", 3, "strategy 'factors' needs the plan's 2 everywhere; take strategy 'product'"),
        ("product", 7, "it trains at rank 7, the plan allows at most 6"),
    ):
        folder = new_run(strategy=strategy)
        grid = make_grid(folder)
        next(iter(grid.sites.values())).rank = rank
        run_rounds(grid, folder)
        (members,) = [event for event in folder.events() if event["event"] == "members"]
        assert words in members["declined"]["site-a"]


def test_a_strategy_without_a_common_model_releases_none(new_run: Make, make_grid: Make) -> None:
    folder = new_run(strategy="shared-a")
    run_rounds(make_grid(folder), folder)
    number, reason, _ = choose_round(folder.rounds(), folder.info().settings)
    assert (number, "no model for everybody" in reason) == (None, True)


@pytest.mark.parametrize("wire", ["float32", "float16"])
@pytest.mark.parametrize("strategy", WITH_PAIRS)
def test_pooled_statistics_stay_as_they_are_through_every_round(
    new_pool: Make, strategy: str, wire: str
) -> None:
    folder = new_pool(strategy=strategy, wire=wire, max_rank=16, **BOTH)
    grid = grid_of(folder)
    if STRATEGY_TABLE[strategy].ranks:
        small, _, large = grid.sites.values()
        small.rank, large.rank = 1, 16
    run_rounds(grid, folder)
    plan, info, pooled = folder.plan(), folder.info(), folder.pooled()
    assert pooled is not None
    first = rounded(plan, with_statistics(folder, first_state(info, plan), pooled), wire)
    for line in folder.rounds():
        assert {site.status for site in line.sites.values()} == {"ok"}
        state = folder.state_after(line.round)
        for key in plan.state_shapes(trained=False):
            assert first[key].any()
            assert state[key].tobytes() == first[key].tobytes()


@pytest.mark.parametrize("pooled", [{"statistics": "pooled"}, {"class_weights": "pooled"}])
def test_a_robust_rule_does_not_cover_a_pool_and_says_so(
    new_pool: Make, pooled: dict[str, str]
) -> None:
    with pytest.raises(
        ValueError, match=r"robust 'krum' does not cover .*; take statistics 'base'"
    ):
        new_pool(robust="krum", bad_sites=0, min_sites=3, **pooled)


@pytest.mark.parametrize("robust", COORDINATE_RULES)
def test_a_rule_by_value_uses_all_sites_and_leaves_the_common_factor(
    new_run: Make, make_grid: Make, robust: str
) -> None:
    folder = new_run(strategy="frozen-a", robust=robust, min_sites=5)
    run_rounds(make_grid(folder, "abcde"), folder)
    assert [s.share for line in folder.rounds() for s in line.sites.values()] == [1.0] * 20
    first, last = first_state(folder.info(), folder.plan()), folder.state_after(3)
    still = [name for name in first if np.array_equal(first[name], last[name])]
    assert still == [name for name in first if name.endswith("/a")]
    with pytest.raises(ValueError, match=r"a value does not mean the same .* strategy 'frozen-a'"):
        new_run(strategy="product", robust=robust, min_sites=5)


@pytest.mark.parametrize("strategy", ["product", "stack"])
def test_sites_of_any_rank_travel_as_float16_and_stop_anywhere(
    new_run: Make, make_grid: Make, strategy: str
) -> None:
    def run(stops: bool) -> RunFolder:
        folder = new_run(strategy=strategy, wire="float16", max_rank=16)
        for last in (True, False) if stops else (False,):
            grid = make_grid(folder)
            small, _, large = grid.sites.values()
            small.rank, large.rank = 1, 16

            large.change = stop_in(3 if last else None)
            if last:
                with pytest.raises(KeyboardInterrupt):
                    run_rounds(grid, folder)
            else:
                run_rounds(grid, folder)
        return folder

    whole, stopped = run(stops=False), run(stops=True)
    for line in whole.rounds():
        assert {site.status for site in line.sites.values()} == {"ok"}
        state = whole.state_after(line.round)
        assert all(np.array_equal(v, v.astype(np.float16)) for v in state.values())
    plan = whole.plan()
    assert state_bytes(plan, whole.state_after(3)) == state_bytes(plan, stopped.state_after(3))
