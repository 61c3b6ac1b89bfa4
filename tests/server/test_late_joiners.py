"""A site that comes late measures the first state beside a later one, and holds nothing back."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes
from dafne_federated.core.wire import RoundRequest
from dafne_federated.server.release import base_scores, choose_round
from dafne_federated.server.rounds import run_rounds
from tests.server.conftest import BOTH, grid_of, stop_in

Make = Callable[..., Any]
LABELS_AT_FIRST = 0.55  # what pretend sites measure of the first state


def final(folder: RunFolder) -> bytes:
    return state_bytes(folder.plan(), folder.state_after(folder.rounds()[-1].round))


def chosen(folder: RunFolder) -> Any:
    return choose_round(folder.rounds(), folder.info().settings, base_scores(folder))


def silent_in(*groups: int) -> Callable[[Message, RecordDict], RecordDict | None]:
    return lambda m, c: None if m.metadata.group_id in map(str, groups) else c


def asked_for_both(change: Callable[[Message, RecordDict], Any], found: list[int]) -> Any:
    """Note in which rounds a site was sent the first state, too."""

    def note(message: Message, content: RecordDict) -> Any:
        if message.metadata.message_type in ("train.round", "evaluate.state"):
            request = RoundRequest.from_record(message.content)
            assert request.first == ("first" in message.content)
            found.extend([request.round] if request.first else [])
        return change(message, content)

    return note


@pytest.mark.parametrize(
    ("silent", "asked"), [((), []), ((1,), [2]), ((1, 2), [2, 3]), ((1, 2, 3), [2, 3, 4])], ids=str
)
def test_a_site_that_was_silent_at_first_is_asked_until_it_has_measured_the_first_state(
    new_run: Make, make_grid: Make, silent: tuple[int, ...], asked: list[int]
) -> None:
    folder = new_run(deadline=0.1, retries=0)
    grid = make_grid(folder)
    found: dict[str, list[int]] = {site.name: [] for site in grid.sites.values()}
    for site in grid.sites.values():
        change = silent_in(*silent) if site.name == "site-b" else site.change
        site.change = asked_for_both(change, found[site.name])
    run_rounds(grid, folder)
    assert found == {"site-a": [], "site-b": asked, "site-c": []}
    labels = dict.fromkeys(folder.plan().labels, pytest.approx(LABELS_AT_FIRST))
    assert base_scores(folder) == dict.fromkeys(("site-a", "site-b", "site-c"), labels)


def test_the_gate_then_has_figures_of_all_and_releases(new_run: Make, make_grid: Make) -> None:
    folder = new_run(deadline=0.1)
    grid = make_grid(folder)
    list(grid.sites.values())[1].change = silent_in(1, 2, 3)
    run_rounds(grid, folder)
    number, reason = chosen(folder)
    assert (number, "largest gain" in reason) == (3, True)
    lines = folder.rounds()
    lines[-1].sites["site-b"] = lines[-1].sites["site-b"].model_copy(update={"first_dice": {}})
    without = {name: dice for name, dice in base_scores(folder).items() if name != "site-b"}
    assert choose_round([lines[0], lines[-1]], folder.info().settings, without) == (
        None,
        "no state passed the gate: round 3: site-b has never measured the base, so nobody knows "
        "what it would lose",
    )


def test_a_site_that_joins_a_run_that_goes_on_is_asked_as_well(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run()
    grid = make_grid(folder, "ab")
    next(iter(grid.sites.values())).change = stop_in(3)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    run_rounds(make_grid(folder, "abc"), folder)
    found = [line.sites["site-c"].first_dice for line in folder.rounds() if "site-c" in line.sites]
    assert [bool(dice) for dice in found] == [True, False]
    assert chosen(folder)[0] == 3


@pytest.mark.parametrize("stopped_in", [2, 3, 4])
def test_stops_and_the_order_of_arrival_change_nothing(
    new_run: Make, make_grid: Make, stopped_in: int
) -> None:
    results, settings = set(), {"deadline": 0.1, "retries": 0}
    for order, stop in ((list, 0), (lambda ids: ids[::-1], 0), (list, stopped_in)):
        folder = new_run(**settings)
        for last in (stop, 0) if stop else (0,):
            grid = make_grid(folder, order=order)
            one, two, _ = grid.sites.values()
            one.change = stop_in(last) if last else one.change
            two.change = silent_in(1, 2)
            if last:
                with pytest.raises(KeyboardInterrupt):
                    run_rounds(grid, folder)
            else:
                run_rounds(grid, folder)
        scores = repr(base_scores(folder))
        both = [bool(line.sites["site-b"].first_dice) for line in folder.rounds()]
        results.add((final(folder), scores, chosen(folder), tuple(both)))
    ((_, _, _, both_measured),) = results
    assert both_measured == (False, False, True, False)


def test_what_it_trained_does_not_depend_on_what_it_measures_beside(
    new_run: Make, make_grid: Make
) -> None:
    gated, free = (new_run(deadline=0.1, retries=0, gate=gate) for gate in ("validation", "none"))
    for folder in (gated, free):
        grid = make_grid(folder)
        list(grid.sites.values())[1].change = silent_in(1)
        run_rounds(grid, folder)
    assert final(gated) == final(free)
    assert not any(site.first_dice for line in free.rounds() for site in line.sites.values())
    down = [[line.sites["site-b"].bytes_down for line in f.rounds()] for f in (gated, free)]
    assert down[0][1] > 1.5 * down[1][1]
    assert down[0][2:] == down[1][2:]


def test_a_site_that_leaves_it_out_is_refused_in_words(new_run: Make, make_grid: Make) -> None:
    folder = new_run(deadline=0.1, retries=0)
    grid = make_grid(folder)

    def keeps_it(message: Message, content: RecordDict) -> RecordDict | None:
        numbers = content.metric_records.get("metrics", {})
        numbers.pop("first-dice", None)
        numbers.pop("first-dice-cases", None)
        return silent_in(1)(message, content)

    list(grid.sites.values())[1].change = keeps_it
    run_rounds(grid, folder)
    second = folder.rounds()[1].sites["site-b"]
    assert (second.status, second.reason) == (
        "refused",
        "dice of the first state: expected those, got 0",
    )


def test_where_statistics_were_pooled_the_base_is_measured_as_it_was(
    new_pool: Make,
) -> None:
    folder = new_pool(**BOTH)
    grid = grid_of(folder, "ab")
    next(iter(grid.sites.values())).change = stop_in(2)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    run_rounds(grid_of(folder, "abc"), folder)  # and each site checks that it changes nothing
    found = [line.sites["site-c"].first_dice for line in folder.rounds() if "site-c" in line.sites]
    assert [bool(dice) for dice in found] == [True, False, False]
    assert sorted(base_scores(folder)) == ["site-a", "site-b", "site-c"]
