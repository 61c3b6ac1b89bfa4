"""A round closes by rule: all answered, or enough at the deadline, or it is asked again."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict

from dafne_federated.core.errors import RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes
from dafne_federated.server import exchange, lost_messages, quorum
from dafne_federated.server.rounds import run_rounds

Make = Callable[..., Any]


def final(folder: RunFolder) -> bytes:
    return state_bytes(folder.plan(), folder.state_after(folder.rounds()[-1].round))


def unbroken(new_run: Make, make_grid: Make) -> bytes:
    """Return the last state of a run of two sites in which nothing goes wrong."""
    folder = new_run()
    run_rounds(make_grid(folder, "ab"), folder)
    return final(folder)


def site(grid: Any, name: str) -> Any:
    (found,) = (s for s in grid.sites.values() if s.name == name)
    return found


def times(answer: Any, count: int, group: str) -> Callable[[Message, RecordDict], Any]:
    """Answer so ``count`` times in a round, and properly afterwards."""
    left = [count]

    def change(message: Message, content: RecordDict) -> Any:
        if message.metadata.group_id == group and left[0] > 0:
            left[0] -= 1
            return answer
        return content

    return change


def spoilt(message: Message, content: RecordDict) -> RecordDict:
    if message.metadata.message_type == "train.round":
        content.array_records["arrays"]["0006/delta"] = Array(np.full((1, 1, 4, 3), np.nan, "f4"))
    return content


def silent(message: Message, content: RecordDict) -> RecordDict | None:
    return None if message.metadata.message_type == "train.round" else content


@pytest.mark.parametrize(
    ("answer", "retries"), [(None, 1), (Error(8, "killed"), 1), (None, 3)], ids=str
)
def test_a_round_that_is_asked_again_ends_in_the_same_bits(
    new_run: Make, make_grid: Make, answer: Any, retries: int
) -> None:
    smooth = unbroken(new_run, make_grid)
    folder = new_run(deadline=0.1, retries=retries)
    grid = make_grid(folder, "ab")
    site(grid, "site-b").change = times(answer, retries, "2")
    run_rounds(grid, folder)
    assert final(folder) == smooth
    assert [line.attempts for line in folder.rounds()] == [1, 1 + retries, 1, 1]
    # Nobody who has answered is asked again.
    assert site(grid, "site-a").received.count("train.round") == 3
    assert site(grid, "site-b").received.count("train.round") == 3 + retries


def online_since(grid: Any, stamps: dict[str, str]) -> None:
    """Let sites be online since the moments in ``stamps``; without one a site is offline."""
    grid.get_nodes = lambda: [
        SimpleNamespace(node_id=node, name="", last_activated_at=stamps[site.name])
        for node, site in grid.sites.items()
        if site.name in stamps
    ]


def test_a_site_that_was_started_again_is_asked_again_at_once(
    new_run: Make, make_grid: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth = unbroken(new_run, make_grid)
    monkeypatch.setattr(quorum, "LOOK", 0.1)
    folder = new_run(deadline=600, retries=0)
    grid = make_grid(folder, "ab")
    stamps = {"site-a": "noon", "site-b": "noon"}
    online_since(grid, stamps)

    def forget_once(message: Message, content: RecordDict) -> RecordDict | None:
        if message.metadata.group_id == "2" and stamps["site-b"] == "noon":
            stamps["site-b"] = "one minute later"
            return None
        return content

    site(grid, "site-b").change = forget_once
    run_rounds(grid, folder)
    assert final(folder) == smooth
    assert [line.attempts for line in folder.rounds()] == [1, 1, 1, 1]
    assert site(grid, "site-a").received.count("train.round") == 3
    assert site(grid, "site-b").received.count("train.round") == 4


@pytest.mark.parametrize("kind", ["round", "offer"])
def test_a_site_whose_message_or_answer_was_lost_is_asked_again(
    new_run: Make, make_grid: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    smooth = unbroken(new_run, make_grid)
    monkeypatch.setattr(lost_messages, "FIRST", 0.3)
    monkeypatch.setattr(quorum, "LOOK", 0.1)
    monkeypatch.setattr(exchange, "LOOK", 0.1)
    folder = new_run(deadline=600, retries=0)
    grid = make_grid(folder, "ab")
    group, times_lost = {"round": ("2", 2), "offer": ("0", 1)}[kind]
    lost: list[str] = []

    def lose(message: Message, content: RecordDict) -> RecordDict | None:
        kind = message.metadata.message_type
        if message.metadata.group_id == group and kind != "query.alive" and len(lost) < times_lost:
            lost.append(kind)
            return None
        return content

    site(grid, "site-b").change = lose
    run_rounds(grid, folder)
    assert final(folder) == smooth
    assert [line.attempts for line in folder.rounds()] == [1, 1, 1, 1]
    assert lost == {"round": ["train.round"] * 2, "offer": ["query.offer"]}[kind]
    assert "query.alive" in site(grid, "site-b").received
    assert site(grid, "site-a").received.count("train.round") == 3


def goes_offline(grid: Any, group: str, seconds: float) -> threading.Timer:
    """Let site-b be offline for a while from its first message of a round on."""
    stamps = {"site-a": "noon", "site-b": "noon"}
    online_since(grid, stamps)
    coming = threading.Timer(seconds, lambda: stamps.update({"site-b": "later"}))

    def change(message: Message, content: RecordDict) -> RecordDict | Error:
        if message.metadata.group_id == group and stamps.get("site-b") == "noon":
            del stamps["site-b"]
            coming.start()
        return content if "site-b" in stamps else Error(5, "node unavailable")

    site(grid, "site-b").change = change
    return coming


@pytest.mark.parametrize("min_sites", [1, 2])
def test_a_site_that_was_offline_for_a_while_loses_no_round(
    new_run: Make, make_grid: Make, monkeypatch: pytest.MonkeyPatch, min_sites: int
) -> None:
    smooth = unbroken(new_run, make_grid)
    monkeypatch.setattr(quorum, "LOOK", 0.1)
    folder = new_run(deadline=600, retries=0, min_sites=min_sites)
    grid = make_grid(folder, "ab")
    coming = goes_offline(grid, "2", 1.0)
    run_rounds(grid, folder)
    coming.join()
    assert final(folder) == smooth
    assert [line.attempts for line in folder.rounds()] == [1, 1, 1, 1]
    assert site(grid, "site-b").received.count("train.round") == 4


def test_a_site_that_is_offline_at_the_deadline_was_not_reachable(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(deadline=1.0, retries=1, min_sites=1, rounds=1)
    grid = make_grid(folder, "ab")
    coming = goes_offline(grid, "1", 600)
    run_rounds(grid, folder)
    coming.cancel()
    away = folder.rounds()[0].sites["site-b"]
    assert (away.status, away.reason) == ("silent", "it was not reachable")


def test_nobody_is_asked_again_for_what_was_refused(new_run: Make, make_grid: Make) -> None:
    folder = new_run(retries=5)
    grid = make_grid(folder, "ab")
    site(grid, "site-b").change = spoilt
    with pytest.raises(RunError, match="round 1: expected 2 updates, got 1; site-b: array"):
        run_rounds(grid, folder)
    assert site(grid, "site-b").received.count("train.round") == 1


def test_a_run_that_ended_for_too_few_goes_on_with_that_round(
    new_run: Make, make_grid: Make
) -> None:
    smooth = unbroken(new_run, make_grid)
    folder = new_run(deadline=0.1, retries=0)
    grid = make_grid(folder, "ab")
    site(grid, "site-b").change = times(None, 1, "2")
    with pytest.raises(
        RunError, match=r"round 2: .* got 1; site-b: no answer within 0.1 s; started again, the run"
    ):
        run_rounds(grid, folder)
    assert len(folder.rounds()) == 1
    run_rounds(make_grid(folder, "ab"), folder)
    assert final(folder) == smooth


def test_enough_at_the_deadline_is_enough_and_nobody_waits_longer(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(deadline=0.1, grace=60, retries=5, rounds=1)
    grid = make_grid(folder)
    site(grid, "site-c").change = silent
    run_rounds(grid, folder)
    first, _ = folder.rounds()
    assert (first.attempts, first.sites["site-c"].status) == (1, "silent")
    assert site(grid, "site-c").received.count("train.round") == 1


def test_the_grace_is_for_rounds_with_too_few(new_run: Make, make_grid: Make) -> None:
    """An answer after the deadline and within the grace counts in its own round."""
    folder = new_run(deadline=0.05, grace=30, retries=0, rounds=1)
    grid = make_grid(folder, "ab")
    begun = time.monotonic()
    pull = grid.pull_messages

    def slow(identities: Any) -> Any:
        held = [i for i in identities if time.monotonic() > begun + 0.3 or _from(grid, i) != "b"]
        return pull(held)

    grid.pull_messages = slow
    run_rounds(grid, folder)
    assert [line.attempts for line in folder.rounds()] == [1, 1]
    assert folder.rounds()[0].sites["site-b"].status == "ok"


def _from(grid: Any, identity: str) -> str:
    reply = grid._replies.get(identity)
    kind = "" if reply is None else reply.metadata.message_type
    if kind != "train.round":
        return ""
    return str(reply.content.config_records["message"]["site"])[-1]


@pytest.mark.parametrize("robust", ["krum", "multi-krum", "geometric-median"])
def test_a_refused_site_is_one_of_the_bad_ones_that_a_rule_bears(
    new_run: Make, make_grid: Make, robust: str
) -> None:
    sites = 3 if robust == "geometric-median" else 5
    folder = new_run(robust=robust, min_sites=sites)
    grid = make_grid(folder, "abcde"[:sites])
    site(grid, "site-b").change = spoilt
    run_rounds(grid, folder)
    told = [event for event in folder.events() if event["event"] == "weighed"]
    assert [event["bad"] for event in told] == [0] * 3
    assert all(line.sites["site-b"].status == "refused" for line in folder.rounds()[:3])


def test_a_silent_site_may_be_a_good_one_so_the_rule_needs_another(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(robust="krum", min_sites=5, deadline=0.1)
    grid = make_grid(folder, "abcde")
    site(grid, "site-b").change = silent
    with pytest.raises(RunError, match="round 1: expected 5 updates, got 4; site-b: no answer"):
        run_rounds(grid, folder)
    assert site(grid, "site-b").received.count("train.round") == 2
    folder = new_run(robust="krum", min_sites=5, deadline=0.1)
    grid = make_grid(folder, "abcdef")
    site(grid, "site-b").change = silent
    run_rounds(grid, folder)
    assert folder.rounds()[0].attempts == 1


def test_the_last_evaluation_is_asked_again_too(new_run: Make, make_grid: Make) -> None:
    folder = new_run(deadline=0.1)
    grid = make_grid(folder, "ab")
    site(grid, "site-b").change = times(None, 1, "4")
    run_rounds(grid, folder)
    assert [line.attempts for line in folder.rounds()] == [1, 1, 1, 2]
    folder = new_run(deadline=0.1, retries=0)
    grid = make_grid(folder, "ab")
    site(grid, "site-b").change = times(None, 1, "4")
    with pytest.raises(RunError, match="round 4: expected 2 sites that measure the last state, g"):
        run_rounds(grid, folder)
    assert len(folder.rounds()) == 3


def test_an_update_that_is_out_of_proportion_does_not_make_a_quorum(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(min_sites=3)
    grid = make_grid(folder, "abc")

    def huge(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "train.round":
            array = Array(np.full((1, 1, 4, 3), 9e3, "f4"))
            content.array_records["arrays"]["0006/delta"] = array
        return content

    site(grid, "site-b").change = huge
    with pytest.raises(RunError, match="expected 3 updates, got 2; site-b: its update is too lar"):
        run_rounds(grid, folder)
