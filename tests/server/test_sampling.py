"""Who trains follows from seed, round and names; everybody measures, so a release is possible."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import state_bytes
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.core.wire import RoundRequest
from dafne_federated.server.release import choose_round, provenance
from dafne_federated.server.rounds import run_rounds
from dafne_federated.server.sampling import sampled
from tests.server.conftest import stop_in

Make = Callable[..., Any]
NAMES = [f"site-{letter}" for letter in "abcdef"]
WITH_PAIRS = [name for name, rules in STRATEGY_TABLE.items() if rules.pairs != "never"]


def test_the_draw_depends_on_seed_round_and_names_alone() -> None:
    for number in range(1, 20):
        drawn = sampled(NAMES, 3, 1, number)
        assert drawn == sampled(reversed(NAMES), 3, 1, number)
        assert len(set(drawn)) == 3
        assert drawn == sorted(drawn)
    draws = {tuple(sampled(NAMES, 3, seed, 1)) for seed in range(20)}
    assert len(draws) > 5
    assert sampled(NAMES, 0, 1, 1) == sampled(NAMES, 6, 1, 1) == sampled(NAMES, 9, 1, 1) == NAMES


def test_no_site_is_drawn_more_often_than_others() -> None:
    counts = Counter(name for number in range(3000) for name in sampled(NAMES, 2, 7, number))
    assert counts.keys() == set(NAMES)
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4.6 standard deviations


def test_fewer_than_min_sites_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="sites-per-round: expected 0 for all, or at least min-s"):
        RunSettings(sites_per_round=1, min_sites=2)


@pytest.mark.parametrize("strategy", WITH_PAIRS)
def test_the_drawn_sites_train_and_all_measure_every_state(
    new_run: Make, make_grid: Make, strategy: str
) -> None:
    folder = new_run(strategy=strategy, sites_per_round=2)
    grid = make_grid(folder, "abcd")
    epochs: dict[tuple[str, int], int] = {}

    def note(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type in ("train.round", "evaluate.state"):
            request = RoundRequest.from_record(message.content)
            site = str(content.config_records["message"]["site"])
            epochs[site, request.round] = request.epochs
        return content

    for site in grid.sites.values():
        site.change = note
    run_rounds(grid, folder)
    *trained, last = folder.rounds()
    for line in trained:
        drawn = set(sampled(NAMES[:4], 2, folder.info().settings.seed, line.round))
        assert {name for name, site in line.sites.items() if site.asked} == drawn
        assert {name for name, site in line.sites.items() if site.training_cases} == drawn
        assert {name for (name, number), n in epochs.items() if number == line.round and n} == drawn
        assert line.whole
    for line in folder.rounds():
        assert {name for name, site in line.sites.items() if site.dice} == set(NAMES[:4])
    assert all(site.asked for site in last.sites.values())
    number, reason, _ = choose_round(folder.rounds(), folder.info().settings)
    assert (number == 3) == STRATEGY_TABLE[strategy].common, reason


def test_a_site_that_only_measured_is_no_author_of_a_release(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(sites_per_round=2, rounds=1)
    run_rounds(make_grid(folder, "abcd"), folder)
    history = provenance(folder.info(), folder.plan(), folder.rounds(), 1)
    assert (history["sites"], history["training_cases"], history["sites_per_round"]) == (2, 6, 2)


def test_a_run_that_goes_on_draws_the_same_sites(new_run: Make, make_grid: Make) -> None:
    unbroken, folder = new_run(sites_per_round=2), new_run(sites_per_round=2)
    run_rounds(make_grid(unbroken, "abcd"), unbroken)
    grid = make_grid(folder, "abcd")

    next(iter(grid.sites.values())).change = stop_in(2)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    run_rounds(make_grid(folder, "dcba"), folder)
    plan = folder.plan()
    assert state_bytes(plan, folder.state_after(3)) == state_bytes(plan, unbroken.state_after(3))


def test_a_site_of_small_rank_that_only_measures_measures_the_state_whole(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(sites_per_round=2, rounds=4)
    grid = make_grid(folder, "abcd")
    small = next(iter(grid.sites.values()))
    small.rank = 1
    run_rounds(grid, folder)
    for line, rank in zip(folder.rounds(), small.ranks, strict=True):
        trains = line.trained and line.sites["site-a"].asked
        assert rank == (1 if trains else 2)
        assert line.whole == (not trains or line.round == 1)  # the first state is zero
