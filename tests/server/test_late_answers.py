"""An answer that comes after its round is dropped or used by rule, and told in both cases."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict

from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.server.release import provenance
from dafne_federated.server.rounds import run_rounds
from dafne_federated.server.sampling import sampled
from tests.server.conftest import PretendGrid, PretendSite, stop_in

Make = Callable[..., Any]
USABLE = [n for n, rules in STRATEGY_TABLE.items() if rules.late and rules.pairs != "never"]


class LateGrid(PretendGrid):
    """Keeps the answer of one site to one round until another round has begun."""

    def __init__(self, sites: list[PretendSite], late: str, asked: int, comes: int) -> None:
        super().__init__(sites, order=lambda ids: sorted(ids, key=lambda i: int(i[1:])))
        self.late, self.asked, self.comes, self.now = late, asked, comes, 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self.now = max([self.now, *(int(m.metadata.group_id) for m in sent)])
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([i for i in message_ids if not self._held(i)])

    def _held(self, identity: str) -> bool:
        reply = self._replies.get(identity)
        if reply is None or reply.metadata.group_id != str(self.asked) or self.now >= self.comes:
            return False
        return self.sites[reply.metadata.src_node_id].name == self.late


def run(folder: RunFolder, asked: int = 1, comes: int = 2, **changes: Any) -> LateGrid:
    """Run with three sites, the second one late; ``changes`` are of their answers."""
    sites = [PretendSite(f"site-{name}", folder.plan()) for name in "abc"]
    grid = LateGrid(sites, "site-b", asked, comes)
    for name, change in changes.items():
        sites["abc".index(name)].change = change
    run_rounds(grid, folder)
    return grid


def silent_in(group: str) -> Callable[[Message, RecordDict], RecordDict | None]:
    return lambda message, content: None if message.metadata.group_id == group else content


def final(folder: RunFolder) -> bytes:
    return state_bytes(folder.plan(), folder.state_after(3))


def told(folder: RunFolder) -> list[tuple[Any, ...]]:
    events = [event for event in folder.events() if event["event"] == "late answer"]
    return [(e["site"], e["round"], e["during"], e["used"]) for e in events]


def test_dropped_it_changes_no_bit_and_is_told(new_run: Make) -> None:
    never, late = new_run(deadline=0.1), new_run(deadline=0.1)
    run(never, b=silent_in("1"))
    run(late)
    assert final(late) == final(never)
    assert told(late) == [("site-b", 1, 2, False)]
    assert late.rounds()[0].sites["site-b"].status == "silent"
    # Its bytes were sent all the same.
    up = [line.sites["site-b"].bytes_up for line in late.rounds()]
    assert up[1] > 1.9 * up[2]


@pytest.mark.parametrize("strategy", USABLE)
def test_used_it_stands_for_the_site_where_it_gave_no_other(new_run: Make, strategy: str) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "deadline": 0.1}
    dropped, used = new_run(**settings), new_run(**settings, late="use")
    for folder in (dropped, used):
        run(folder, b=silent_in("2"))
    assert final(dropped) != final(used)
    assert told(used) == [("site-b", 1, 2, True)]
    own = used.rounds()[1].sites["site-b"]
    assert (own.status, own.training_cases, own.share) == ("late", 3, 1.0)
    assert own.reason == ("no answer within 0.1 s; its update of round 1 came late and is used")
    assert own.update_norm > 0
    assert own.dice == {}  # it says nothing about the state of this round
    assert provenance(used.info(), used.plan(), used.rounds(), 3)["sites"] == 3
    again = new_run(**settings, late="use")
    run(again, b=silent_in("2"))
    assert final(again) == final(used)


def test_used_it_counts_for_the_quorum(new_run: Make) -> None:
    folder = new_run(deadline=0.1, late="use", retries=0)
    run(folder, b=silent_in("2"), c=silent_in("2"))
    assert folder.rounds()[1].sites["site-b"].status == "late"


def test_an_update_of_its_own_goes_before_the_late_one(new_run: Make) -> None:
    never, late = new_run(deadline=0.1), new_run(deadline=0.1, late="use")
    run(never, b=silent_in("1"))
    run(late)
    assert final(late) == final(never)
    assert told(late) == [("site-b", 1, 2, False)]


def test_an_answer_of_two_rounds_before_is_dropped(new_run: Make) -> None:
    folder = new_run(deadline=0.1, late="use")
    run(folder, comes=3, b=lambda m, c: None if m.metadata.group_id in "23" else c)
    assert told(folder) == [("site-b", 1, 3, False)]
    assert folder.rounds()[2].sites["site-b"].status == "silent"


def test_nothing_late_is_used_in_the_last_evaluation(new_run: Make) -> None:
    folder = new_run(deadline=0.1, late="use", min_sites=1)
    run(folder, asked=3, comes=4, b=silent_in("4"))
    assert told(folder) == [("site-b", 3, 4, False)]
    assert folder.rounds()[3].sites["site-b"].status == "silent"


def nan(message: Message, content: RecordDict) -> Any:
    if message.metadata.group_id == "1" and "arrays" in content:
        content.array_records["arrays"]["0006/delta"] = Array(np.full((1, 1, 4, 3), np.nan, "f4"))
    return None if message.metadata.group_id == "2" else content


def large(message: Message, content: RecordDict) -> Any:
    if message.metadata.group_id == "1" and "arrays" in content:
        content.array_records["arrays"]["0006/delta"] = Array(np.full((1, 1, 4, 3), 9e3, "f4"))
    return None if message.metadata.group_id == "2" else content


@pytest.mark.parametrize(("change", "status"), [(nan, "silent"), (large, "refused")])
def test_the_gate_judges_a_late_update_as_any_other(
    new_run: Make, change: Any, status: str
) -> None:
    never, late = new_run(deadline=0.1), new_run(deadline=0.1, late="use")
    run(never, b=lambda m, c: None if m.metadata.group_id in "12" else c)
    run(late, b=change)
    assert final(late) == final(never)
    assert late.rounds()[1].sites["site-b"].status == status
    assert told(late) == [("site-b", 1, 2, False)]


def test_a_site_that_is_not_drawn_may_bring_its_late_update(new_run: Make) -> None:
    names = ["site-a", "site-b", "site-c"]
    seed = next(
        s
        for s in range(100)
        if "site-b" in sampled(names, 2, s, 1) and "site-b" not in sampled(names, 2, s, 2)
    )
    folder = new_run(deadline=0.1, late="use", sites_per_round=2, seed=seed, min_sites=1, rounds=2)
    run(folder)
    own = folder.rounds()[1].sites["site-b"]
    assert (own.status, own.asked, own.training_cases) == ("late", False, 3)
    assert own.dice  # it measured the state of this round


def test_after_a_restart_it_is_lost_and_the_run_ends_as_if_it_never_came(new_run: Make) -> None:
    never, folder = (new_run(deadline=0.1, late="use") for _ in range(2))
    run(never, b=lambda m, c: None if m.metadata.group_id in "12" else c)

    with pytest.raises(KeyboardInterrupt):
        run(folder, a=stop_in(2))
    run(folder, b=silent_in("2"))
    assert final(folder) == final(never)
    assert told(folder) == []
