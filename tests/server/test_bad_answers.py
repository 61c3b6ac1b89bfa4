"""Rounds use what is good and refuse what is not, and a bad site costs the others nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict

from dafne_federated.core.errors import RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import state_bytes
from dafne_federated.server.rounds import run_rounds
from dafne_federated.strategies.outliers import update_norm

Make = Callable[..., Any]


def final(folder: RunFolder) -> bytes:
    return state_bytes(folder.plan(), folder.state_after(folder.rounds()[-1].round))


def spoil_arrays(message: Message, content: RecordDict) -> RecordDict:
    if "arrays" in content:
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


def test_too_few_updates_end_the_run_with_the_reasons(new_run: Make, make_grid: Make) -> None:
    folder = new_run()
    grid = make_grid(folder, "ab")
    list(grid.sites.values())[1].change = spoil_arrays
    with pytest.raises(RunError, match=r"round 1: expected 2 updates, got 1; site-b: array"):
        run_rounds(grid, folder)
    assert folder.rounds() == []
