"""Rounds use what is good, refuse what is not, survive a stop, and do not depend on order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from dafne_federated.core.errors import RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.server.release import provenance
from dafne_federated.server.rounds import run_rounds
from dafne_federated.strategies.outliers import update_norm
from tests.server.conftest import stop_in

Make = Callable[..., Any]


def final(folder: RunFolder) -> bytes:
    last = folder.rounds()[-1].round
    return state_bytes(folder.plan(), folder.state_after(last))


def test_a_run_trains_all_rounds_and_evaluates_the_last_state(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run()
    run_rounds(make_grid(folder), folder)
    lines = folder.rounds()
    assert [(line.round, line.trained) for line in lines] == [
        (1, True),
        (2, True),
        (3, True),
        (4, False),
    ]
    assert lines[2].state_digest == lines[3].state_digest
    assert all(site.status == "ok" for line in lines for site in line.sites.values())
    assert lines[3].aggregation_error is None


def test_the_base_goes_down_once_and_later_messages_carry_adapters_only(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run()
    grid = make_grid(folder)
    next(iter(grid.sites.values())).has_base = True
    run_rounds(grid, folder)
    kinds = [site.received for site in grid.sites.values()]
    assert [k.count("train.base") for k in kinds] == [0, 1, 1]
    assert kinds[0] == ["query.offer", *["train.round"] * 3, "evaluate.state"]
    state = len(state_bytes(folder.plan(), folder.state_after(1)))
    for line in folder.rounds()[1:3]:
        for site in line.sites.values():
            assert 0 < site.bytes_up < 2 * state
            assert 0 < site.bytes_down < 2 * state


WITH_PAIRS = [name for name, rules in STRATEGY_TABLE.items() if rules.pairs != "never"]


@pytest.mark.parametrize("strategy", WITH_PAIRS)
def test_order_of_arrival_does_not_change_a_bit(
    new_run: Make, make_grid: Make, strategy: str
) -> None:
    results = set()
    for order in (list, lambda ids: ids[::-1], lambda ids: ids[1:] + ids[:1]):
        folder = new_run(strategy=strategy)
        run_rounds(make_grid(folder, order=order), folder)
        results.add(final(folder))
    assert len(results) == 1


@pytest.mark.parametrize(
    ("strategy", "stopped_in"),
    [*(("product", number) for number in (1, 2, 3, 4)), *((name, 3) for name in WITH_PAIRS)],
)
def test_a_run_stopped_anywhere_ends_in_the_same_bits(
    new_run: Make, make_grid: Make, strategy: str, stopped_in: int
) -> None:
    unbroken = new_run(strategy=strategy)
    run_rounds(make_grid(unbroken), unbroken)

    folder = new_run(strategy=strategy)
    grid = make_grid(folder)

    list(grid.sites.values())[1].change = stop_in(stopped_in)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    assert len(folder.rounds()) == stopped_in - 1
    # What a kill in the middle of writing leaves behind must not matter.
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "si')
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    (folder.path / "checkpoints" / ".round-0009.npz.tmp").write_bytes(b"half")

    run_rounds(make_grid(folder), folder)
    assert final(folder) == final(unbroken)
    assert [line.round for line in folder.rounds()] == [1, 2, 3, 4]
    run_rounds(make_grid(folder), folder)  # a finished run has nothing left to do
    assert final(folder) == final(unbroken)


def test_half_the_bytes_and_the_kept_state_is_the_one_that_sites_evaluate(
    new_run: Make, make_grid: Make
) -> None:
    whole, half = new_run(), new_run(wire="float16")
    states = []

    def note(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type in ("train.round", "evaluate.state"):
            states.append(message.content.array_records["arrays"])
        return content

    for folder in (whole, half):
        grid = make_grid(folder)
        states.clear()
        next(iter(grid.sites.values())).change = note
        run_rounds(grid, folder)
    values = sum(value.size for value in half.state_after(1).values())
    for one, other in zip(whole.rounds()[1:3], half.rounds()[1:3], strict=True):
        for name, site in one.sites.items():
            # The request also says which type it is; that is as long in both.
            assert site.bytes_up - other.sites[name].bytes_up == 2 * values
            assert site.bytes_down - other.sites[name].bytes_down == 2 * values
    received = states[-len(half.rounds()) :]
    for number in (1, 2, 3):
        for key, value in half.state_after(number).items():
            sent = received[number][key].numpy()
            assert sent.dtype == np.float16
            np.testing.assert_array_equal(sent.astype(np.float32), value)


def spoil_arrays(message: Message, content: RecordDict) -> RecordDict:
    if "arrays" in content:
        from flwr.app import Array

        content.array_records["arrays"]["0006/delta"] = Array(np.full((1, 1, 4, 3), np.nan, "f4"))
    return content


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (spoil_arrays, "refused", "finite values"),
        (
            lambda m, c: Error(2, "<class 'X'>:<'/home/person/secret'>"),
            "failed",
            "without an answer",
        ),
        (lambda m, c: RecordDict({}), "refused", "no record 'message'"),
        (lambda m, c: None, "silent", "no answer within 1 s"),
    ],
    ids=["nan", "crash", "empty", "silent"],
)
def test_a_bad_site_costs_the_others_nothing(
    new_run: Make, make_grid: Make, spoil: Any, status: str, words: str
) -> None:
    alone = new_run()
    run_rounds(make_grid(alone, "ac"), alone)

    folder = new_run(deadline=1.0)
    grid = make_grid(folder)

    def change(message: Message, content: RecordDict) -> Any:
        return (
            spoil(message, content) if message.metadata.message_type == "train.round" else content
        )

    list(grid.sites.values())[1].change = change
    run_rounds(grid, folder)
    bad = folder.rounds()[0].sites["site-b"]
    assert bad.status == status
    assert words in bad.reason
    assert "secret" not in (folder.path / "rounds.jsonl").read_text()
    assert final(folder) == final(alone)


def huge(message: Message, content: RecordDict) -> RecordDict:
    from flwr.app import Array

    if message.metadata.message_type == "train.round":
        content.array_records["arrays"]["0006/delta"] = Array(np.full((1, 1, 4, 3), 9e3, "f4"))
    return content


def boast(message: Message, content: RecordDict) -> RecordDict:
    if message.metadata.message_type == "train.round":
        content.metric_records["metrics"]["training-cases"] = 1000
    return content


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(huge, "its update is too large"), (boast, "training cases: expected 1 to 3, got 1000")],
)
def test_an_update_out_of_proportion_is_refused(
    new_run: Make, make_grid: Make, spoil: Any, words: str
) -> None:
    alone = new_run()
    run_rounds(make_grid(alone, "acd"), alone)
    folder = new_run()
    grid = make_grid(folder, "abcd")
    list(grid.sites.values())[1].change = spoil
    run_rounds(grid, folder)
    assert words in folder.rounds()[0].sites["site-b"].reason
    # Its Dice is of what it was sent, and honest whatever its update is.
    dice = [line.sites["site-b"].dice for line in folder.rounds()]
    assert dice == [line.sites["site-a"].dice for line in folder.rounds()]
    assert all(dice)
    assert folder.rounds()[0].sites["site-b"].training_cases == 0
    assert final(folder) == final(alone)


def test_a_site_that_suddenly_shouts_is_refused_by_its_own_history(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(min_sites=1)  # two sites have no median to be compared with
    grid = make_grid(folder, "ab")

    def shout(message: Message, content: RecordDict) -> RecordDict:
        return huge(message, content) if message.metadata.group_id == "2" else content

    list(grid.sites.values())[1].change = shout
    run_rounds(grid, folder)
    first, second, third, _ = (line.sites["site-b"] for line in folder.rounds())
    assert first.status == third.status == "ok"
    assert "its update is too large after its earlier ones: expected a norm" in second.reason
    norms = update_norm(folder.plan(), folder.state_after(1))
    assert first.update_norm == pytest.approx(norms, rel=0.5)


def test_with_a_shared_factor_a_site_that_missed_a_round_is_taken_back(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(strategy="shared-a", deadline=1.0, max_norm_ratio=4.0)
    grid = make_grid(folder)

    def miss(message: Message, content: RecordDict) -> RecordDict | None:
        return None if message.metadata.group_id == "1" else content

    list(grid.sites.values())[1].change = miss
    run_rounds(grid, folder)
    found = [(line.sites["site-b"].status, line.sites["site-b"].reason) for line in folder.rounds()]
    assert found == [("silent", "no answer within 1 s"), *[("ok", "")] * 3]


@pytest.mark.parametrize("robust", ["clipped", "krum", "multi-krum", "geometric-median"])
def test_a_robust_rule_is_applied_and_told(new_run: Make, make_grid: Make, robust: str) -> None:
    folder = new_run(robust=robust, min_sites=5)
    run_rounds(make_grid(folder, "abcde"), folder)
    told = [event for event in folder.events() if event["event"] == "weighed"]
    assert [event["round"] for event in told] == [1, 2, 3]
    assert [event["rule"] for event in told] == [robust] * 3
    used = {"krum": 1, "multi-krum": 4}.get(robust, 5)
    assert [len(event["shares"]) for event in told] == [used] * 3
    for event, line in zip(told, folder.rounds(), strict=False):
        assert {n: s.share for n, s in line.sites.items() if s.share > 0} == event["shares"]
    history = provenance(folder.info(), folder.plan(), folder.rounds(), 1)
    assert (history["robust"], history["bad_sites"], history["wire"]) == (robust, 1, "float32")
    assert history["sites"] == used
    plain = new_run(min_sites=5)
    run_rounds(make_grid(plain, "abcde"), plain)
    assert final(folder) != final(plain)


def test_a_release_says_how_persons_were_hidden(new_run: Make) -> None:
    def told(**settings: Any) -> dict[str, Any]:
        folder = new_run(**settings)
        return provenance(folder.info(), folder.plan(), [], 0)

    hidden = told(privacy="person", noise=3.0, clip=0.2, person_rate=0.25)
    added = {"privacy": "person", "noise": 3.0, "clip": 0.2, "person_rate": 0.25}
    plain = told()
    assert added.items() <= hidden.items()
    assert hidden.keys() - plain.keys() == added.keys()


def test_updates_lie_in_a_private_folder_until_the_round_ends(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run()
    grid = make_grid(folder)
    seen = []

    def look(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.group_id == "2":
            seen.append((folder.path / "updates").exists())
        return content

    next(iter(grid.sites.values())).change = look
    run_rounds(grid, folder)
    assert seen == [False]  # what round 1 left is gone when round 2 begins
    assert not (folder.path / "updates").exists()
    kept = folder.keep_update("../site", {"x": np.zeros(1, np.float32)})
    assert kept["x"] == 0
    assert (folder.path / "updates").stat().st_mode & 0o077 == 0
    assert len(list((folder.path / "updates").glob("*.npz"))) == 1


def test_sites_may_change_between_a_stop_and_going_on(new_run: Make, make_grid: Make) -> None:
    from dafne_federated.core.run_folder import RunFolder as Folder

    folder = new_run()
    grid = make_grid(folder, "abc")

    next(iter(grid.sites.values())).change = stop_in(2)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    run_rounds(make_grid(folder, "ab"), folder)
    again = Folder(folder.path)
    history = provenance(again.info(), again.plan(), again.rounds(), 3)
    assert (history["sites"], history["training_cases"]) == (3, 9)


def test_only_one_process_runs_a_folder(new_run: Make) -> None:
    import subprocess
    import sys

    folder = new_run()
    code = (
        "import sys; from pathlib import Path; "
        "from dafne_federated.core.run_folder import RunFolder; "
        "RunFolder(Path(sys.argv[1])).lock().__enter__()"
    )
    with folder.lock():
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    assert "another process is running the rounds" in done.stderr
    with folder.lock():
        pass


def test_too_few_updates_end_the_run_with_the_reasons(new_run: Make, make_grid: Make) -> None:
    folder = new_run()
    grid = make_grid(folder, "ab")
    list(grid.sites.values())[1].change = spoil_arrays
    with pytest.raises(RunError, match=r"round 1: expected 2 updates, got 1; site-b: array"):
        run_rounds(grid, folder)
    assert folder.rounds() == []


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
