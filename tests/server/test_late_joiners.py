"""A site that comes late compares with the base itself, so that it holds no release back."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from dafne_federated.server.release import choose_round
from dafne_federated.server.rounds import run_rounds
from tests.server.conftest import stop_in

Make = Callable[..., Any]


def silent_in(*groups: int) -> Callable[[Message, RecordDict], RecordDict | None]:
    return lambda m, c: None if m.metadata.group_id in map(str, groups) else c


@pytest.mark.parametrize("silent", [(1,), (1, 2), (1, 2, 3)], ids=str)
def test_a_site_that_was_silent_at_first_has_its_say_as_soon_as_it_speaks(
    new_run: Make, make_grid: Make, silent: tuple[int, ...]
) -> None:
    folder = new_run(deadline=0.1, retries=0)
    grid = make_grid(folder)
    (site,) = (s for s in grid.sites.values() if s.name == "site-b")
    site.change = silent_in(*silent)
    run_rounds(grid, folder)
    number, _, decision = choose_round(folder.rounds(), folder.info().settings)
    assert (number, decision.persons) == (3, 3)
    again = new_run(deadline=0.1, retries=0)
    worse = make_grid(again)
    (other,) = (s for s in worse.sites.values() if s.name == "site-b")
    other.change, other.base_dice = silent_in(*silent), 0.9
    run_rounds(worse, again)
    number, reason, _ = choose_round(again.rounds(), again.info().settings)
    assert (number, "of site-b" in reason) == (None, True)


def test_a_site_that_joins_a_run_that_goes_on_has_its_say(new_run: Make, make_grid: Make) -> None:
    folder = new_run()
    grid = make_grid(folder, "ab")
    next(iter(grid.sites.values())).change = stop_in(3)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    run_rounds(make_grid(folder, "abc"), folder)
    number, _, decision = choose_round(folder.rounds(), folder.info().settings)
    assert number == 3
    assert {line.site for line in decision.lines} == {"", "site-a", "site-b", "site-c"}
