"""A site takes part under the name that it was registered with, and under no other."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dafne_federated.server.rounds import run_rounds

Make = Callable[..., Any]


def registered(grid: Any, names: dict[int, str]) -> None:
    grid.get_nodes = lambda: [SimpleNamespace(node_id=i, name=n) for i, n in names.items()]


def test_a_site_that_takes_the_name_of_another_is_declined(new_run: Make, make_grid: Make) -> None:
    folder = new_run(rounds=1, min_sites=1)
    grid = make_grid(folder, "ab")
    one, two = grid.sites
    registered(grid, {one: grid.sites[one].name, two: "clinic"})
    run_rounds(grid, folder)
    (members,) = [event for event in folder.events() if event["event"] == "members"]
    assert members["sites"] == [grid.sites[one].name]
    assert members["declined"] == {"clinic": f"it calls itself {grid.sites[two].name!r}"}


@pytest.mark.parametrize("known", [0, 1])
def test_a_node_that_nobody_registered_is_not_asked(
    new_run: Make, make_grid: Make, known: int
) -> None:
    folder = new_run(rounds=1, min_sites=1)
    grid = make_grid(folder, "ab")
    node = list(grid.sites)[known]
    registered(grid, {node: grid.sites[node].name})
    run_rounds(grid, folder)
    assert list(folder.rounds()[0].sites) == [grid.sites[node].name]
