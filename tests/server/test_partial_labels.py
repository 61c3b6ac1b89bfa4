"""The server leaves a site out of the columns that it lacks, and holds it to what it lacks."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, SiteRound
from dafne_federated.core.wire import RoundReply
from dafne_federated.server.answers import Answer, with_same_labels
from dafne_federated.server.late_answers import LateAnswer, with_late
from dafne_federated.server.rounds import first_state, run_rounds
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.update_gate import Verdict

Make = Callable[..., Any]
HEAD = "0006/delta"


def with_output(folder: RunFolder) -> RunFolder:
    """Return a run like ``folder`` whose plan names the output layer."""
    plan = folder.plan().model_copy(update={"output": ("0006",)})
    info = folder.info().model_copy(update={"plan_digest": plan.digest})
    path = folder.path.with_name(f"{folder.path.name}-output")
    return RunFolder.create(path, info, plan, folder.base_bytes())


def lacking(missing: Callable[[int], list[int] | None]) -> Callable[..., RecordDict]:
    """Return what makes a site say that it lacks some labels, by the number of the round."""

    def change(message: Message, content: RecordDict) -> RecordDict:
        if not message.metadata.message_type.startswith(("train.round", "evaluate")):
            return content
        reply = RoundReply.from_record(content)
        told = reply.model_copy(update={"missing": missing(reply.round)}).to_record()
        for name, record in content.array_records.items():
            told[name] = record
        return told

    return change


def after_one(folder: RunFolder, grid: Any, plan: AdaptationPlan) -> np.ndarray:
    run_rounds(grid, folder)
    assert sha256(folder.base_bytes()) == plan.base_digest
    return folder.state_after(1)[HEAD]


def test_a_column_moves_by_those_who_annotated_its_label(new_run: Make, make_grid: Make) -> None:
    alone = {}
    for name in "ab":
        folder = with_output(new_run(rounds=1, min_sites=1))
        alone[name] = after_one(folder, make_grid(folder, name), folder.plan())
    folder = with_output(new_run(rounds=1))
    grid = make_grid(folder, "ab")
    grid.sites[11].change = lacking(lambda _: [2])
    both = after_one(folder, grid, folder.plan())
    start = first_state(folder.info(), folder.plan())[HEAD]
    assert not np.array_equal(start, both)
    np.testing.assert_array_equal(both[..., 2], alone["a"][..., 2])
    mean = (alone["a"].astype(np.float64) + alone["b"]) / 2
    np.testing.assert_allclose(both[..., :2], mean[..., :2], rtol=1e-6)
    lacks = {name: site.lacks for name, site in folder.rounds()[0].sites.items()}
    assert lacks == {"site-a": (), "site-b": ("dark",)}


def test_what_a_site_says_beside_a_failure_ends_no_round(new_run: Make, make_grid: Make) -> None:
    def change(message: Message, content: RecordDict) -> RecordDict:
        if not message.metadata.message_type.startswith(("train.round", "evaluate")):
            return content
        reply = RoundReply.from_record(content)
        return reply.model_copy(update={"status": "failed", "missing": [9]}).to_record()

    folder = with_output(new_run(rounds=1, min_sites=1))
    grid = make_grid(folder)
    grid.sites[12].change = change
    run_rounds(grid, folder)
    assert [s.status for s in folder.rounds()[0].sites.values()] == ["ok", "ok", "failed"]


def test_a_late_update_is_held_to_what_its_own_answer_says(
    make_state: Make, small_plan: AdaptationPlan
) -> None:
    def answered(number: int, missing: list[int] | None) -> Answer:
        reply = RoundReply(
            run="0" * 32, round=number, site="b", base_digest="b" * 64, plan_digest="c" * 64,
            status="ok", training_cases=2, missing=missing,
        )  # fmt: skip
        update = Update("b", make_state(number), 2)
        return Answer(Verdict("ok", reply=reply, update=update), training=reply)

    silent = Answer(Verdict("silent", "no answer within 1 s"))
    first = RoundLine(
        round=1, trained=True, aggregation_error=None, state_digest="", seconds=1.0,
        sites={"b": SiteRound(status="ok", training_cases=2, lacks=("dark",))},
    )  # fmt: skip

    def closed(missing: list[int] | None) -> Answer:
        late = [LateAnswer("b", 2, 9, answered(2, missing))]
        return with_same_labels(with_late({"b": silent}, late, 3), small_plan, [first])["b"]

    assert closed([2]).late
    assert closed([2]).verdict.status == "ok"
    turned = closed(None)
    assert (turned.late, turned.verdict.status) == (False, "refused")
    assert "expected it to lack ['dark'] as before, got []" in turned.verdict.reason


def test_a_site_that_lacks_other_labels_than_before_is_refused(
    new_run: Make, make_grid: Make
) -> None:
    folder = with_output(new_run(rounds=3, min_sites=1))
    grid = make_grid(folder)
    grid.sites[11].change = lacking(lambda number: [2] if number != 2 else None)
    grid.sites[12].change = lacking(lambda number: [1, 2])
    run_rounds(grid, folder)
    status = [[s.status for s in line.sites.values()] for line in folder.rounds()]
    assert (
        status
        == [["ok", "ok", "refused"], ["ok", "refused", "refused"]] + [["ok", "ok", "refused"]] * 2
    )
    reasons = [line.sites["site-b"].reason for line in folder.rounds()]
    assert "its labels: expected it to lack ['dark'] as before, got []" in reasons[1]
    assert "expected some of 1 to 2 in order" in folder.rounds()[0].sites["site-c"].reason
