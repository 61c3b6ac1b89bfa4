"""A site takes part under its registered name, and who declines is left out with the reason."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from dafne_federated.core.errors import RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server import exchange
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


@pytest.mark.parametrize("kind", ["query.offer", "train.base"])
def test_a_site_whose_program_dies_before_the_first_round_is_asked_again(
    new_run: Make, make_grid: Make, kind: str
) -> None:
    folder = new_run(rounds=1)
    grid = make_grid(folder, "ab")
    (site,) = (s for s in grid.sites.values() if s.name == "site-b")

    def die_once(message: Message, content: RecordDict) -> RecordDict | Error:
        dies = message.metadata.message_type == kind and site.received.count(kind) == 1
        return Error(8, "killed") if dies else content

    site.change = die_once
    run_rounds(grid, folder)
    assert list(folder.rounds()[0].sites) == ["site-a", "site-b"]
    assert site.received.count(kind) == 2


@pytest.mark.parametrize("kind", ["query.offer", "train.base"])
def test_a_site_that_was_offline_before_the_first_round_uses_no_retry(
    new_run: Make, make_grid: Make, kind: str
) -> None:
    folder = new_run(rounds=1, retries=1, deadline=600)
    grid = make_grid(folder, "ab")
    (site,) = (s for s in grid.sites.values() if s.name == "site-b")

    def offline_twice(message: Message, content: RecordDict) -> RecordDict | Error:
        away = message.metadata.message_type == kind and site.received.count(kind) <= 2
        return Error(5, "node unavailable") if away else content

    site.change = offline_twice
    run_rounds(grid, folder)
    assert list(folder.rounds()[0].sites) == ["site-a", "site-b"]
    assert site.received.count(kind) == 3


def test_a_site_that_stays_offline_before_the_first_round_gave_no_answer(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(rounds=1, deadline=1.0, min_sites=1)
    grid = make_grid(folder, "ab")
    (site,) = (s for s in grid.sites.values() if s.name == "site-b")
    site.change = lambda message, _: Error(5, "node unavailable")
    run_rounds(grid, folder)
    (members,) = (event for event in folder.events() if event["event"] == "members")
    assert list(members["declined"].values()) == ["no answer within 1 s"]


def test_a_site_that_was_started_again_before_the_first_round_is_asked_again_at_once(
    new_run: Make, make_grid: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LOOK", 0.1)
    folder = new_run(rounds=1, deadline=600)
    grid = make_grid(folder, "ab")
    (site,) = (s for s in grid.sites.values() if s.name == "site-b")
    grid.get_nodes = lambda: [
        SimpleNamespace(node_id=i, name="", last_activated_at=f"{s.name} {len(site.received)}")
        for i, s in grid.sites.items()
    ]

    def forget_once(message: Message, content: RecordDict) -> RecordDict | None:
        return content if site.received.count("query.offer") > 1 else None

    site.change = forget_once
    run_rounds(grid, folder)
    assert list(folder.rounds()[0].sites) == ["site-a", "site-b"]
    assert site.received.count("query.offer") == 2


def test_a_site_with_other_versions_is_declined_in_words(new_run: Make, make_grid: Make) -> None:
    folder = new_run(rounds=1, min_sites=1)
    grid = make_grid(folder, "ab")
    one, two = grid.sites

    def older(message: Any, content: Any) -> Any:
        if message.metadata.message_type == "query.offer":
            record = dict(content["message"])
            del record["tensorflow"]  # as of a protocol that did not have it
            content["message"] = ConfigRecord(record | {"keras": "2.9.0", "protocol": 0})
        return content

    grid.sites[two].change = older
    run_rounds(grid, folder)
    (members,) = [event for event in folder.events() if event["event"] == "members"]
    assert members["sites"] == [grid.sites[one].name]
    (reason,) = members["declined"].values()
    assert reason.startswith(
        "versions differ: protocol 0 at this site and 1 at the coordinator, Keras 2.9.0 at this"
    )
    assert "TensorFlow not said at this site" in reason
    assert reason.endswith("install those of the coordinator at this site")


def test_too_few_sites_end_the_run_with_the_number(new_run: Make, make_grid: Make) -> None:
    folder = new_run(min_sites=4)
    with pytest.raises(RunError, match="expected at least 4 sites, got 3"):
        run_rounds(make_grid(folder), folder)


def test_sites_that_decline_are_left_out_with_their_reason(new_run: Make, make_grid: Make) -> None:
    folder = new_run()
    grid = make_grid(folder)

    def decline(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "query.offer":
            content.config_records["message"]["status"] = "refused"
            content.config_records["message"]["reason"] = "the base is not approved at this site"
        return content

    list(grid.sites.values())[2].change = decline
    run_rounds(grid, folder)
    assert sorted(folder.rounds()[0].sites) == ["site-a", "site-b"]
    (members,) = [event for event in folder.events() if event["event"] == "members"]
    assert members["declined"] == {"site-c": "the base is not approved at this site"}


def test_two_sites_of_one_name_are_not_mixed_up(new_run: Make, make_grid: Make) -> None:
    folder = new_run()
    grid = make_grid(folder, "abb")
    run_rounds(grid, folder)
    assert sorted(folder.rounds()[0].sites) == ["site-a", "site-b"]
    (members,) = [event for event in folder.events() if event["event"] == "members"]
    assert "another site is called 'site-b'" in str(members["declined"])


def test_a_rank_of_its_own_keeps_no_site_out_of_a_run_without_pairs(
    new_run: Make, make_grid: Make
) -> None:
    pairs = new_run()
    whole = tuple(target for target in pairs.plan().targets if not target.low_rank)
    plan = pairs.plan().model_copy(update={"targets": whole})
    info = new_run(strategy="fedavg", method="head").info()
    info = info.model_copy(update={"plan_digest": plan.digest})
    folder = RunFolder.create(pairs.path.parent / "whole", info, plan, pairs.base_bytes())
    grid = make_grid(folder)
    list(grid.sites.values())[1].rank = 99
    run_rounds(grid, folder)
    for line in folder.rounds():
        assert line.whole
        assert {name: site.status for name, site in line.sites.items()} == dict.fromkeys(
            ("site-a", "site-b", "site-c"), "ok"
        )
