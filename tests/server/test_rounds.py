"""Rounds survive a stop and do not depend on order; what is kept of them is what was sent."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.server.release import provenance
from dafne_federated.server.rounds import run_rounds
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
