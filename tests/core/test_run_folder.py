"""What a run leaves on disk is whole, read back exactly, and refused when damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dafne_federated.core.errors import RunError, StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import (
    RoundLine,
    RunFolder,
    RunInfo,
    RunResult,
    SiteRound,
)
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, state_bytes


@pytest.fixture
def info(small_plan: AdaptationPlan) -> RunInfo:
    return RunInfo(
        run="0" * 32,
        created=1,
        base_digest=small_plan.base_digest,
        base_name="Base",
        plan_digest=small_plan.digest,
        settings=RunSettings(rounds=3),
        versions={"numpy": "2"},
        command="dafne-federated simulate",
    )


@pytest.fixture
def folder(tmp_path: Path, info: RunInfo, small_plan: AdaptationPlan) -> RunFolder:
    return RunFolder.create(tmp_path / "run", info, small_plan, b"base")


def line(number: int) -> RoundLine:
    site = SiteRound(status="ok", dice={"bright": 0.5, "dark": None}, dice_cases={"bright": 1})
    return RoundLine(
        round=number, trained=True, sites={"a": site}, aggregation_error=0.1,
        state_digest="", seconds=1.0,
    )  # fmt: skip


def test_everything_is_read_back(
    folder: RunFolder, info: RunInfo, small_plan: AdaptationPlan, make_state: Callable[..., State]
) -> None:
    assert folder.info() == info
    assert folder.plan() == small_plan
    assert folder.base.read_bytes() == b"base"
    for number in (1, 2):
        folder.finish_round(line(number), make_state(number))
    assert folder.rounds() == [line(1), line(2)]
    for number in (1, 2):
        want = state_bytes(small_plan, make_state(number))
        assert state_bytes(small_plan, folder.state_after(number)) == want
    result = RunResult(released=False, reason="r", round=None, base_dice={}, dice={})
    folder.finish(result)
    assert folder.result() == result


def test_a_round_done_again_replaces_what_followed(
    folder: RunFolder, make_state: Callable[..., State]
) -> None:
    for number in (1, 2, 3):
        folder.finish_round(line(number), make_state(number))
    folder.finish_round(line(2), make_state(7))
    assert [entry.round for entry in folder.rounds()] == [1, 2]


def test_a_line_cut_short_is_left_out(folder: RunFolder, make_state: Callable[..., State]) -> None:
    folder.finish_round(line(1), make_state(1))
    with (folder.path / "rounds.jsonl").open("a") as file:
        file.write(line(2).model_dump_json()[:40])
    assert [entry.round for entry in folder.rounds()] == [1]


def test_a_damaged_checkpoint_is_refused(
    folder: RunFolder, make_state: Callable[..., State]
) -> None:
    folder.finish_round(line(1), make_state(1))
    (path,) = (folder.path / "checkpoints").glob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StateError, match=r"round-0001\.npz"):
        folder.state_after(1)
    with pytest.raises(StateError):
        folder.state_after(2)


def test_a_run_is_never_overwritten(
    folder: RunFolder, info: RunInfo, small_plan: AdaptationPlan
) -> None:
    with pytest.raises(RunError, match="there is a run in .* already"):
        RunFolder.create(folder.path, info, small_plan, b"other")


def test_events_are_read_while_they_are_written(folder: RunFolder) -> None:
    folder.event("one", number=1)
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "ha')
    assert [event["event"] for event in folder.events()] == ["one"]


def test_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is .* the folder of a run"):
        RunFolder(tmp_path).info()
    (tmp_path / "run.json").write_text('{"run": 3}')
    with pytest.raises(RunError, match=r"run\.json: "):
        RunFolder(tmp_path).info()
