"""The server leaves a site out of the columns that it lacks, and holds it to what it lacks."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.wire import RoundReply
from dafne_federated.server.rounds import first_state, run_rounds

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
    assert reasons[1] == "its labels: expected it to lack ['dark'] as before, got []"
    assert "expected some of 1 to 2 in order" in folder.rounds()[0].sites["site-c"].reason
