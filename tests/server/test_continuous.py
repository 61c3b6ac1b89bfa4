"""New cases make versions, each as good a run as any; who has none is not asked to train."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from dafne_federated.cli.server_history import history_lines
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.model_file import read_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, initial_state, state_bytes
from dafne_federated.core.wire import RoundRequest
from dafne_federated.core.wire_arrays import take_state
from dafne_federated.server.continuation import Absent, Continuation, continuation, staleness
from dafne_federated.server.continuous import run_generation
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.generation import (
    GenerationInfo,
    check_continuous,
    last_trained,
    make_generation,
    versions,
)
from dafne_federated.server.model_card import CARD_DATA, CARD_PAGE
from dafne_federated.server.rounds import run_rounds
from tests.server.conftest import PretendGrid, PretendSite, SharingSite, grid_of, stop_in

Make = Callable[..., Any]
News = Callable[[dict[str, PretendSite]], None]


class Waited(Exception):  # noqa: N818 - no error: nothing is left to do
    """A generation waits for new cases and none will come."""


@pytest.fixture
def generation(new_pool: Make) -> Make:
    """A function that makes a generation with a base that can be folded into."""

    def make(**settings: Any) -> RunFolder:
        folder: RunFolder = new_pool(rounds=2, **settings)
        make_generation(folder, GenerationInfo(every=1))
        return folder

    return make


def run(folder: RunFolder, grid: PretendGrid, *news: News, last: int | None = None) -> None:
    """Run until nothing happens any more; each of ``news`` happens in a pause."""
    left = list(news)

    def pause(_seconds: float) -> None:
        if not left:
            raise Waited
        left.pop(0)({site.name: site for site in grid.sites.values()})

    try:
        run_generation(grid, folder, last, pause)
    except Waited:
        assert last is None


def more(**cases: int) -> News:
    def happen(sites: dict[str, PretendSite]) -> None:
        for name, count in cases.items():
            sites[f"site-{name}"].cases += count

    return happen


def final(folder: RunFolder) -> bytes:
    return state_bytes(folder.plan(), folder.state_after(folder.rounds()[-1].round))


def trained(version: RunFolder) -> list[str]:
    first = version.rounds()[0]
    return [name for name, site in first.sites.items() if site.training_cases]


def test_the_weight_falls_with_the_root_of_how_far_behind() -> None:
    assert [staleness(behind) for behind in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


def test_a_first_version_is_the_run_that_all_sites_would_have_made(generation: Make) -> None:
    folder, plain = generation(), generation()
    run(folder, grid_of(folder))
    run_rounds(grid_of(plain), plain)
    (version,) = versions(folder)
    assert final(version) == final(plain)
    assert version.result().released
    assert (version.release / version.result().release).exists()
    assert folder.rounds() == []
    assert version.base.stat().st_ino == folder.base.stat().st_ino


def test_only_sites_with_new_cases_train_and_all_measure(generation: Make) -> None:
    folder = generation()
    grid = grid_of(folder)
    run(folder, grid, more(a=1), more(c=2), more(b=1))
    first, second = versions(folder)  # b's case alone is too little for a third
    assert [trained(version) for version in (first, second)] == [
        ["site-a", "site-b", "site-c"],
        ["site-a", "site-c"],
    ]
    for line in second.rounds():
        assert all(site.dice for site in line.sites.values())
    record = continuation(second)
    assert record is not None
    assert record.new_cases == {"site-a": 1, "site-c": 2}
    assert {name: absent.behind for name, absent in record.contained.items()} == {
        "site-a": 1, "site-b": 1, "site-c": 1
    }  # fmt: skip
    told = [event for event in folder.events() if event["event"] == "version finished"]
    assert [event["sites"] for event in told] == [
        {"site-a": 3, "site-b": 3, "site-c": 3},
        {"site-a": 4, "site-c": 5},
    ]


def test_the_card_of_a_version_says_what_it_started_from_and_whom_it_contains(
    generation: Make,
) -> None:
    folder = generation()
    run(folder, grid_of(folder), more(a=1, b=1))
    first, second = versions(folder)
    cards = [json.loads((v.release / CARD_DATA).read_text()) for v in (first, second)]
    pages = [(v.release / CARD_PAGE).read_text() for v in (first, second)]
    assert "Change of Dice from the base in" in pages[0]
    assert "Change of Dice from the version that it started from in" in pages[1]
    assert [page.count("Change of Dice from the base in") for page in pages] == [1, 1]
    assert [card["decision"]["against"] for card in cards] == ["base", "start"]
    assert cards[1]["decision"]["base"]["against"] == "base"
    assert [card["method"]["version"] for card in cards] == [1, 2]
    assert [
        {site["site"]: (site["training_cases"], site["earlier_cases"]) for site in card["sites"]}
        for card in cards
    ] == [
        {"site-a": (3, 0), "site-b": (3, 0), "site-c": (3, 0)},
        {"site-a": (4, 3), "site-b": (4, 3), "site-c": (0, 3)},
    ]
    told = read_model(second.release / second.result().release).metadata["federated"]
    assert (told["sites"], told["training_cases"]) == (2, 8)
    assert (told["earlier_sites"], told["earlier_training_cases"]) == (1, 3)


def test_states_accumulate_and_each_release_is_newer(generation: Make) -> None:
    folder = generation()
    run(folder, grid_of(folder), more(a=1, b=1), more(a=1, b=1))
    found = versions(folder)
    assert len(found) == 3
    for one, two in itertools.pairwise(found):
        record, result = continuation(two), one.result()
        assert record is not None
        assert record.start_digest == one.rounds()[(result.round or 0) - 1].state_digest
        assert two.info().created > one.info().created
    assert len({version.result().release for version in found}) == 3
    assert len({version.info().run for version in found}) == 3
    third = continuation(found[2])
    assert third is not None
    assert {n: (a.cases, a.behind) for n, a in third.contained.items()} == {
        "site-a": (4, 1), "site-b": (4, 1), "site-c": (3, 2)
    }  # fmt: skip


def test_who_trains_no_more_stands_in_the_mean_with_what_was(generation: Make) -> None:
    """By hand, for whole arrays: three updates of 4, 4 and, one release ago, 3 cases."""
    folder = generation(strategy="factors")
    grid = grid_of(folder)
    sent: list[Any] = []

    def note(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "train.round" and message.metadata.group_id == "1":
            sent.append(content.array_records["arrays"])
        return content

    for site in grid.sites.values():
        site.change = note
    run(folder, grid, more(a=1, b=1))
    first, second = versions(folder)
    start = first.state_after(first.result().round or 0)
    old = 3 / math.sqrt(2)
    for name in start:
        if name.endswith("/delta"):
            a, b = (record[name].numpy().astype(np.float64) for record in sent[-2:])
            wanted = (4 * a + 4 * b + old * start[name]) / (8 + old)
            np.testing.assert_allclose(second.state_after(1)[name], wanted, rtol=1e-5, atol=1e-7)


def test_a_version_that_is_not_better_is_left_behind(generation: Make) -> None:
    folder = generation()
    grid = grid_of(folder)

    def worse(message: Message, content: RecordDict) -> RecordDict:
        if "message" in content and "metrics" in content and message.metadata.group_id in "23":
            metrics = content.metric_records["metrics"]
            metrics["dice"] = [0.1 for _ in metrics["dice"]]
            metrics["change-total"] = [-0.45 for _ in metrics["change-total"]]
            metrics["change-squares"] = [0.45**2 for _ in metrics["change-squares"]]
        return content

    def spoil(sites: dict[str, PretendSite]) -> None:
        more(a=1, b=1)(sites)
        sites["site-a"].change = worse

    def mend(sites: dict[str, PretendSite]) -> None:
        sites["site-a"].change = lambda _, content: content

    run(folder, grid, spoil, mend, more(b=1, c=1))
    first, second, third = versions(folder)
    assert [v.result().released for v in (first, second, third)] == [True, False, True]
    # It is not tried again with the same cases, and the next one starts from what was released.
    one, two = continuation(second), continuation(third)
    assert one is not None
    assert two is not None
    assert one.start_digest == two.start_digest
    assert trained(third) == ["site-b", "site-c"]


class DriftingSite(SharingSite):
    """Finds one label better and another worse with each version behind a state."""

    def __init__(self, name: str, plan: AdaptationPlan, loss: float) -> None:
        super().__init__(name, plan)
        self.steps = np.array([0.08] + [-loss] * (len(plan.labels) - 1))
        self.behind: dict[str, int] = {}  # versions, by digest of the state

    def round(self, message: Message) -> RecordDict:
        content = super().round(message)
        arrays, request = message.content.array_records, RoundRequest.from_record(message.content)
        start = self.versions_behind(arrays["first"], 0) if request.first else 0
        behind = self.versions_behind(arrays["arrays"], start + 1)
        compared = [start, 0] if request.first else [0]
        totals = [d for old in compared for _ in range(2) for d in (behind - old) * self.steps]
        metrics = content.metric_records["metrics"]
        metrics["dice"] = list(0.5 + behind * self.steps)
        metrics["change-total"] = totals
        metrics["change-squares"] = [total**2 for total in totals]
        return content

    def versions_behind(self, arrays: Any, unknown: int) -> int:
        state: State = take_state(RecordDict({"arrays": arrays}), self.plan)
        if not any(value.any() for name, value in state.items() if not name.endswith("/a")):
            return 0
        return self.behind.setdefault(arrays_digest(state), unknown)


@pytest.mark.parametrize(("loss", "released"), [(0.03, 1), (0.02, 2), (0.013, 3), (0.01, 4)])
def test_versions_together_never_lose_more_than_the_margin_against_the_base(
    generation: Make, loss: float, released: int
) -> None:
    """Each loses less than the margin of 0.05 against the one before, and gains on average."""
    folder = generation()
    sites = [DriftingSite(f"site-{name}", folder.plan(), loss) for name in "abc"]
    run(folder, PretendGrid(list(sites)), *[more(a=1, b=1)] * 3)
    results = [version.result() for version in versions(folder)]
    assert [result.released for result in results] == [n < released for n in range(4)]
    label = folder.plan().labels[1]
    for number, result in enumerate(results, start=1):
        decision = result.decision
        assert decision is not None
        assert (decision.against, decision.base is None) == (
            ("base", True) if number == 1 else ("start", False)
        )
        assert not any(line.falls for line in decision.lines)
        assert min(line.change for line in decision.lines) == pytest.approx(-loss)
        whole = decision if decision.base is None else decision.base
        total = loss * min(number, released + 1)
        assert min(line.change for line in whole.lines) == pytest.approx(-total)
        assert whole.accepted == result.released == (total <= 0.05)
        if not result.released:
            words = f"round 1: against the base: {label} of site-a falls by {total:.3f}"
            assert words in result.reason
        elif number > 1:
            assert "; nor against the base, from which it rises by" in result.reason


def test_sites_are_sent_what_a_version_started_from_only_after_a_release(generation: Make) -> None:
    folder = generation()
    grid = grid_of(folder)
    run(folder, grid, more(a=1, b=1))
    for site in grid.sites.values():
        requests = site.requests  # type: ignore[attr-defined]
        last = {request.run: request.first for request in requests}
        assert list(last.values()) == [False, True]
    first, second = (v.rounds()[-1].sites.values() for v in versions(folder))
    assert all(s.accept and not s.accept_base and not s.choose_base for s in first)
    assert all(s.accept.keys() == s.accept_base.keys() for s in second)


@pytest.mark.parametrize("moment", [1, 2, 3, "between"])
def test_a_kill_anywhere_ends_in_the_same_bits(generation: Make, moment: Any) -> None:
    digests = []
    for killed in (False, True):
        folder = generation()
        grid = grid_of(folder)
        run(folder, grid, last=1)
        sites = {site.name: site for site in grid.sites.values()}
        more(a=1, b=1)(sites)
        if killed and moment == "between":
            grid = PretendGrid(list(sites.values()))
        elif killed:
            sites["site-b"].change = stop_in(moment)
            with pytest.raises(KeyboardInterrupt):
                run_generation(grid, folder, 2, lambda _: None)
            (folder.path / "versions" / ".half").mkdir()
            sites["site-b"].change = lambda _, content: content
            grid = PretendGrid(list(sites.values()))
        run(folder, grid, last=2)
        more(a=1, c=1)(sites)
        run(folder, grid, last=3)
        digests.append([(final(v), v.result().round) for v in versions(folder)])
        assert [trained(v) for v in versions(folder)][1:] == [
            ["site-a", "site-b"], ["site-a", "site-c"]
        ]  # fmt: skip
    assert digests[0] == digests[1]


def test_a_version_whose_sites_are_gone_is_dropped_until_other_cases_come(generation: Make) -> None:
    folder = generation(deadline=0.1, retries=0)
    grid = grid_of(folder, "ab")

    def gone(message: Message, content: RecordDict) -> Any:
        return None if message.metadata.message_type == "train.round" else content

    def back(sites: dict[str, PretendSite]) -> None:
        sites["site-b"].change = lambda _, content: content
        more(a=1)(sites)

    list(grid.sites.values())[1].change = gone
    run(folder, grid, *[lambda _: None] * 9, back)
    kinds = [event["event"] for event in folder.events()]
    assert kinds.count("version dropped") == 1
    assert kinds.count("version begun") == 2
    assert kinds.count("version finished") == 1
    assert [path.name for path in (folder.path / "versions").iterdir()] == ["0001"]
    assert [trained(version) for version in versions(folder)] == [["site-a", "site-b"]]


def test_what_was_dropped_begins_again_when_a_site_left_and_came_again(generation: Make) -> None:
    folder = generation(deadline=0.1, retries=0)
    grid = grid_of(folder, "ab")
    node, site = list(grid.sites.items())[1]

    def gone(message: Message, content: RecordDict) -> Any:
        return None if message.metadata.message_type == "train.round" else content

    def come_again(_sites: dict[str, PretendSite]) -> None:
        site.change = lambda _, content: content
        grid.sites[node + 100] = grid.sites.pop(node)

    site.change = gone
    run(folder, grid, *[lambda _: None] * 4, come_again)
    assert [trained(version) for version in versions(folder)] == [["site-a", "site-b"]]


def test_a_site_that_declined_is_asked_again_and_told_once(generation: Make) -> None:
    folder = generation()
    grid = grid_of(folder)

    def decline(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "query.offer":
            content["message"]["status"] = "refused"
            content["message"]["reason"] = "not approved"
        return content

    def approve(sites: dict[str, PretendSite]) -> None:
        sites["site-c"].change = lambda _, content: content
        more(a=1)(sites)

    list(grid.sites.values())[2].change = decline
    run(folder, grid, lambda _: None, lambda _: None, approve)
    assert [trained(version) for version in versions(folder)] == [
        ["site-a", "site-b"], ["site-a", "site-c"]
    ]  # fmt: skip
    told = [event["declined"] for event in folder.events() if event["event"] == "members"]
    assert told == [{"site-c": "not approved"}, {}]


def test_a_version_that_nobody_judged_uses_up_no_cases(generation: Make) -> None:
    folder = generation()
    grid = grid_of(folder)

    def silent(message: Message, content: RecordDict) -> RecordDict:
        """Let nobody measure, in the rounds after the first, what was measured in it."""
        if "metrics" in content and message.metadata.group_id in "23":
            metrics = content.metric_records["metrics"]
            for name in ("change-persons", "change-total", "change-squares"):
                metrics[name] = [0 * value for value in metrics[name]]
        return content

    sites = list(grid.sites.values())
    sites[0].change = silent

    def mend(_sites: dict[str, PretendSite]) -> None:
        sites[0].change = lambda _, content: content

    def look(_sites: dict[str, PretendSite]) -> None:
        (version,) = versions(folder)  # and no other with the same cases
        decision = version.result().decision
        assert decision is not None
        assert not decision.looked_at
        assert last_trained(folder) == {}

    run(folder, grid, lambda _: None, look, mend, more(b=1))
    assert [trained(v) for v in versions(folder)] == [["site-a", "site-b", "site-c"]] * 2


def test_a_site_of_an_earlier_version_keeps_its_missing_labels(generation: Make) -> None:
    from dafne_federated.server.continuation import stand_ins

    folder = generation()
    plan = folder.plan()
    record = Continuation(
        version=2,
        start_digest="",
        new_cases={"b": 1},
        contained={"a": Absent(cases=3, behind=3, lacks=(plan.labels[0],))},
    )
    (update,) = stand_ins(record, plan, {}, [])
    assert (update.site, update.cases, update.share) == ("a", 3, 0.5)
    assert set(update.missing.values()) <= {(1,)}
    assert stand_ins(record, plan, {}, [update]) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "shared-a"}, "releases no model for everybody"),
        ({"strategy": "alternating"}, "moves another factor in each round"),
        ({"robust": "clipped"}, "robust reckons with the same sites"),
        ({"statistics": "pooled"}, "statistics reckons with the same sites"),
        ({"strategy": "frozen-a", "server_optimiser": "adam"}, "server-optimiser reckons"),
        ({"strategy": "frozen-a", "privacy": "site"}, "privacy 'site' counts a fixed number"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: dict[str, Any], words: str) -> None:
    check_continuous(RunSettings())
    with pytest.raises(SettingsError, match=words):
        check_continuous(RunSettings.model_validate(settings))


def test_the_history_names_every_generation_and_who_trained(
    generation: Make, tmp_path: Path
) -> None:
    coordinator = ServerFolder(tmp_path / "coordinator")
    coordinator.runs.mkdir(parents=True)
    folder = generation()
    run(folder, grid_of(folder), more(a=1, b=1))
    path = coordinator.runs / "first"
    folder.path.rename(path)
    released = RunFolder(path / "versions" / "0002").result()
    info = RunFolder(path).info()
    plan = RunFolder(path).plan().model_copy(update={"base_digest": released.release_digest})
    newer = {"base_digest": released.release_digest, "plan_digest": plan.digest}
    changes = newer | {"created": info.created + 100}
    next_path = coordinator.runs / "second"
    made = RunFolder.create(next_path, info.model_copy(update=changes), plan, b"base")
    make_generation(made, GenerationInfo())
    lines = history_lines(coordinator)
    assert lines[0].startswith("generation 1: first, base Base (")
    assert (
        "site-a 3, site-b 3, site-c 3; Dice +0.100 in 3 persons who accept; released Thigh_"
        in lines[1]
    )
    assert "site-a 4, site-b 4; Dice +0.100 in 3 persons who accept, +0.100 from the" in lines[2]
    assert lines[3].startswith("generation 2: second, base version 0002 of first (")
    assert lines[4:] == ["  no version yet"]


def test_no_site_outweighs_those_that_trained_earlier_and_all_others(generation: Make) -> None:
    """By hand: 3 / sqrt(2) and 1 / sqrt(2) cases of earlier trainers bound one of 100."""
    from dafne_federated.server.combining import combined
    from dafne_federated.server.federation import Federation
    from dafne_federated.server.membership import Members
    from dafne_federated.strategies.aggregation import Update

    folder = generation(strategy="factors")
    plan = folder.plan()
    first = initial_state(plan, 0)
    delta = next(name for name in first if name.endswith("/delta"))
    moved = {**first, delta: first[delta] + np.float32(1)}
    record = Continuation(
        version=2,
        start_digest="",
        new_cases={"a": 100},
        contained={"b": Absent(cases=3, behind=1), "c": Absent(cases=1, behind=1)},
    )
    members = Members({}, {}, {}, {}, {}, {})
    federation = Federation(folder, folder.info(), plan, members, 1, first, None, record)
    result = combined(federation, 1, first, [Update("a", moved, 100)], 0)
    np.testing.assert_allclose(result.state[delta], first[delta] + 0.5, rtol=1e-5, atol=1e-6)
    assert result.shares == {"a": pytest.approx(4 / math.sqrt(2) / 100)}
