"""Sites pool once, exactly, in any order, and what a site withholds or spoils costs no round."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.errors import RunError
from dafne_federated.core.model_file import parse_model
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import fold, state_bytes
from dafne_federated.core.wire import RoundReply
from dafne_federated.core.wire_arrays import take_state
from dafne_federated.server import release as release_module
from dafne_federated.server.rounds import run_rounds
from tests.server.conftest import BOTH, SLICES, PretendGrid, SharingSite, grid_of

Make = Callable[..., Any]


def site(grid: PretendGrid, name: str) -> SharingSite:
    (found,) = (s for s in grid.sites.values() if s.name == name)
    assert isinstance(found, SharingSite)
    return found


def final(folder: RunFolder) -> bytes:
    return state_bytes(folder.plan(), folder.state_after(folder.rounds()[-1].round))


def statistics_after(folder: RunFolder, number: int) -> dict[str, Any]:
    base, plan = parse_model(folder.base_bytes()).weights, folder.plan()
    return fold(base, plan, folder.state_after(number))


def test_the_pool_is_that_of_one_site_with_all_slices(new_pool: Make) -> None:
    folder = new_pool(**BOTH)
    grid = grid_of(folder)
    run_rounds(grid, folder)
    first, second = (
        np.concatenate([site(grid, name).values[number] for name in SLICES]).reshape(-1, channels)
        for number, channels in ((0, 5), (1, 3))
    )
    for number in (1, 3, 4):
        folded = statistics_after(folder, number)
        np.testing.assert_allclose(folded["0008"], first.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(folded["0009"], first.var(axis=0), rtol=1e-5)
        np.testing.assert_allclose(folded["0013"], second.var(axis=0), rtol=1e-5)
    state = folder.state_after(1)
    shift = sum(float(state[f"{key}/delta"].sum()) for key in ("0008", "0009"))
    np.testing.assert_allclose(
        statistics_after(folder, 1)["0012"], shift + second.mean(axis=0), rtol=1e-4
    )
    pooled = folder.pooled()
    assert pooled is not None
    assert pooled.classes == ClassCounts(
        tuple(np.sum([site(grid, name).counts for name in SLICES], axis=0).tolist()),
        tuple(np.sum([site(grid, name).holding for name in SLICES], axis=0).tolist()),
    )
    assert {n: (s.status, s.slices) for n, s in pooled.sites.items()} == {
        name: ("shared", count) for name, count in SLICES.items()
    }


def test_counts_go_to_the_sites_with_every_round_of_training(new_pool: Make) -> None:
    folder = new_pool(**BOTH)
    grid = grid_of(folder)
    run_rounds(grid, folder)
    pooled = folder.pooled()
    assert pooled is not None
    base, *rounds, last = site(grid, "site-a").requests
    assert [request.classes for request in rounds] == [pooled.classes] * 3
    assert (base.epochs, base.classes, last.epochs, last.classes) == (0, None, 0, None)


def test_one_exchange_for_the_counts_and_one_for_each_normalisation(new_pool: Make) -> None:
    for settings, kinds in (
        (BOTH, ["evaluate.state", *["query.statistics"] * 3]),
        ({"statistics": "pooled"}, ["evaluate.state", *["query.statistics"] * 2]),
    ):
        folder = new_pool(rounds=1, **settings)
        grid = grid_of(folder)
        run_rounds(grid, folder)
        joined = ["query.offer", "train.base"]
        assert site(grid, "site-b").received == [*joined, *kinds, "train.round", "evaluate.state"]
        up = folder.rounds()[0].sites["site-b"].bytes_up
        assert up > folder.rounds()[1].sites["site-b"].bytes_up + 1000


def test_nothing_is_asked_where_nothing_is_pooled(new_run: Make, make_grid: Make) -> None:
    folder = new_run()
    grid = make_grid(folder)
    run_rounds(grid, folder)
    assert "query.statistics" not in next(iter(grid.sites.values())).received
    assert folder.pooled() is None


def test_order_of_arrival_does_not_change_a_bit(new_pool: Make) -> None:
    results, pools = set(), set()
    for order in (list, lambda ids: ids[::-1], lambda ids: ids[1:] + ids[:1]):
        folder = new_pool(**BOTH)
        run_rounds(grid_of(folder, order=order), folder)
        results.add(final(folder))
        pools.add((folder.path / "statistics.json").read_bytes())
    assert (len(results), len(pools)) == (1, 1)


@pytest.mark.parametrize("stopped_at", ["query.statistics", "1", "2"])
def test_a_run_stopped_anywhere_keeps_the_pool_and_ends_in_the_same_bits(
    new_pool: Make, stopped_at: str
) -> None:
    unbroken = new_pool(**BOTH)
    run_rounds(grid_of(unbroken), unbroken)
    folder = new_pool(**BOTH)
    grid = grid_of(folder)

    def stop(message: Message, content: RecordDict) -> RecordDict:
        kind, group = message.metadata.message_type, message.metadata.group_id
        if stopped_at in (group, kind) and (kind != "query.statistics" or "mean" in str(content)):
            raise KeyboardInterrupt
        return content

    site(grid, "site-b").change = stop
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    kept = folder.pooled()
    assert (kept is None) == (stopped_at == "query.statistics")
    again = grid_of(folder)
    run_rounds(again, folder)
    asked = "query.statistics" in site(again, "site-a").received
    assert asked == (kept is None)
    assert final(folder) == final(unbroken)
    assert site(again, "site-a").requests[-2].classes is not None


def test_a_site_that_withholds_its_numbers_takes_part(new_pool: Make) -> None:
    alone = new_pool(**BOTH)
    run_rounds(grid_of(alone, "ac"), alone)
    folder = new_pool(**BOTH)
    grid = grid_of(folder)
    site(grid, "site-b").shares = False
    run_rounds(grid, folder)
    pooled, without = folder.pooled(), alone.pooled()
    assert pooled is not None
    assert without is not None
    assert (pooled.moments, pooled.classes) == (without.moments, without.classes)
    assert pooled.sites["site-b"].status == "withheld"
    assert site(grid, "site-b").received.count("query.statistics") == 1
    assert [line.sites["site-b"].status for line in folder.rounds()] == ["ok"] * 4


def test_with_nobody_who_shares_the_run_ends_in_words(new_pool: Make) -> None:
    folder = new_pool(**BOTH)
    grid = grid_of(folder)
    for name in SLICES:
        site(grid, name).shares = False
    with pytest.raises(RunError, match="expected a site that shares its own, got none"):
        run_rounds(grid, folder)
    assert folder.rounds() == []


def negative(message: Message, content: RecordDict) -> RecordDict:
    if "mean" in content.array_records.get("arrays", {}):
        size = content.array_records["arrays"]["variance"].shape[0]
        content.array_records["arrays"]["variance"] = Array(np.full(size, -1.0))
    return content


def more_slices(message: Message, content: RecordDict) -> RecordDict:
    if "mean" in content.array_records.get("arrays", {}):
        content.metric_records["metrics"]["slices"] = 50
    return content


def other_size(message: Message, content: RecordDict) -> RecordDict:
    numbers = content.metric_records.get("metrics", {})
    if message.metadata.message_type == "query.statistics" and numbers.get("class-pixels"):
        numbers["class-pixels"] = [4 * n for n in numbers["class-pixels"]]
    return content


def of_statistics(answer: Any) -> Any:
    return lambda m, c: answer if m.metadata.message_type == "query.statistics" else c


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (negative, "refused", "variance: expected values of at least 0"),
        (more_slices, "refused", "training slices: expected 5 as before, got 50"),
        (other_size, "refused", "pixels of a slice: expected 64 as at most sites, got 256"),
        (of_statistics(Error(2, "/home/secret")), "failed", "without an answer"),
        (of_statistics(RecordDict({})), "refused", "no record 'message'"),
        (of_statistics(None), "silent", "no answer within 1 s"),
    ],
    ids=["negative", "slices", "size", "crash", "empty", "silent"],
)
def test_a_bad_answer_costs_the_others_nothing(
    new_pool: Make, spoil: Any, status: str, words: str
) -> None:
    alone = new_pool(statistics="pooled", class_weights="pooled")
    run_rounds(grid_of(alone, "ac"), alone)
    folder = new_pool(deadline=1.0, **BOTH)
    grid = grid_of(folder)
    site(grid, "site-b").change = spoil
    run_rounds(grid, folder)
    pooled, without = folder.pooled(), alone.pooled()
    assert pooled is not None
    assert without is not None
    bad = pooled.sites["site-b"]
    assert bad.status == status
    assert words in bad.reason
    assert "secret" not in (folder.path / "statistics.json").read_text()
    assert pooled.moments == without.moments
    assert folder.rounds()[0].sites["site-b"].status == "ok"


def test_too_few_answers_end_the_run_with_the_reasons(new_pool: Make) -> None:
    folder = new_pool(**BOTH)
    grid = grid_of(folder, "ab")
    site(grid, "site-b").change = negative
    with pytest.raises(RunError, match=r"expected 2 sites that answer, got 1; site-b: variance"):
        run_rounds(grid, folder)
    assert folder.pooled() is None


def test_an_update_with_other_statistics_is_refused(new_pool: Make) -> None:
    folder = new_pool(**BOTH)
    grid = grid_of(folder)

    def tamper(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "train.round":
            array = take_state(content, folder.plan())["0013/delta"]
            content.array_records["arrays"]["0013/delta"] = Array(array * np.float32(1.5))
        return content

    site(grid, "site-c").change = tamper
    run_rounds(grid, folder)
    bad = folder.rounds()[0].sites["site-c"]
    assert (bad.status, "stored statistics as they were sent" in bad.reason) == ("refused", True)


def test_the_gate_compares_with_the_base_as_it_was(new_pool: Make) -> None:
    folder = new_pool(rounds=2, margin=0.0, **BOTH)
    grid = grid_of(folder)
    seen = itertools.count()

    def best_at_first(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "evaluate.state" and next(seen) < len(SLICES):
            reply = RoundReply.from_record(content)
            return reply.model_copy(update={"dice": [0.99, 0.99]}).to_record()
        return content

    for name in SLICES:
        site(grid, name).change = best_at_first
        site(grid, name).base_dice = 0.99  # that of the base as it was
    run_rounds(grid, folder)
    result = release_module.release(folder)
    assert not result.released
    assert result.base_dice == {name: {"bright": 0.99, "dark": 0.99} for name in SLICES}
    assert result.decision is not None
    assert "falls by 0.340" in result.decision.reason
