"""What a run leaves on disk is whole, read back exactly, and refused when damaged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import RunError, StateError
from dafne_federated.core.files import arrays_digest, sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.pooled_statistics import (
    PooledMoments,
    PooledSite,
    PooledStatistics,
)
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
        base_digest=sha256(b"base"),
        base_name="Base",
        plan_digest=small_plan.digest,
        settings=RunSettings(rounds=3),
        versions={"numpy": "2"},
        command="dafne-federated simulate",
    )


@pytest.fixture
def folder(tmp_path: Path, info: RunInfo, small_plan: AdaptationPlan) -> RunFolder:
    return RunFolder.create(tmp_path / "run", info, small_plan, b"base")


def line(number: int, state: State | None = None) -> RoundLine:
    site = SiteRound(status="ok", dice={"bright": 0.5, "dark": None}, dice_cases={"bright": 1})
    return RoundLine(
        round=number, trained=True, sites={"a": site}, aggregation_error=0.1,
        state_digest="" if state is None else arrays_digest(state), seconds=1.0,
    )  # fmt: skip


def test_everything_is_read_back(
    folder: RunFolder, info: RunInfo, small_plan: AdaptationPlan, make_state: Callable[..., State]
) -> None:
    assert folder.info() == info
    assert folder.plan() == small_plan
    assert folder.base.read_bytes() == b"base"
    lines = [line(number, make_state(number)) for number in (1, 2)]
    for entry in lines:
        folder.finish_round(entry, make_state(entry.round))
    assert folder.rounds() == lines
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


def test_damaged_or_missing_lines_are_refused(
    folder: RunFolder, make_state: Callable[..., State]
) -> None:
    for number in (1, 2):
        folder.finish_round(line(number), make_state(number))
    path = folder.path / "rounds.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    for text, words in (
        (first[:40] + "\n" + second, "line 1 is damaged"),
        (second, "expected round 1, got 2"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=words):
            folder.rounds()


def test_a_line_holds_whatever_text_a_reason_has(
    folder: RunFolder, make_state: Callable[..., State]
) -> None:
    odd = line(1).model_copy(
        update={"sites": {"a": SiteRound(status="refused", reason="a\u2028b\u0085c\nd")}}
    )
    folder.finish_round(odd, make_state(1))
    assert folder.rounds() == [odd]


def test_another_plan_base_or_state_than_recorded_is_refused(
    folder: RunFolder, make_state: Callable[..., State], small_plan: AdaptationPlan
) -> None:
    folder.finish_round(line(1, make_state(1)), make_state(1))
    other = small_plan.model_copy(update={"scale": 2.0})
    (folder.path / "checkpoints" / "round-0001.npz").write_bytes(
        state_bytes(small_plan, make_state(2))
    )
    with pytest.raises(RunError, match=r"round-0001\.npz: expected digest"):
        folder.state_after(1)
    (folder.path / "plan.json").write_text(other.to_json())
    with pytest.raises(RunError, match=r"plan\.json: expected digest"):
        folder.plan()
    folder.base.write_bytes(b"other")
    with pytest.raises(RunError, match=r"base\.model: expected digest"):
        folder.base_bytes()


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
    with pytest.raises(RunError, match=r"there is a run in .* already"):
        RunFolder.create(folder.path, info, small_plan, b"other")


def test_events_are_read_while_they_are_written(folder: RunFolder) -> None:
    folder.event("one", number=1)
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "ha')
    assert [event["event"] for event in folder.events()] == ["one"]
    folder.event("two")  # after a kill in the middle of a line
    assert [event["event"] for event in folder.events()] == ["one", "two"]


def test_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is .* the folder of a run"):
        RunFolder(tmp_path).info()
    (tmp_path / "run.json").write_text('{"run": 3}')
    with pytest.raises(RunError, match=r"run\.json: "):
        RunFolder(tmp_path).info()


def test_what_was_pooled_is_read_back_to_the_last_digit(folder: RunFolder) -> None:
    assert folder.pooled() is None
    generator = np.random.default_rng(0)
    mean, variance = generator.normal(size=(2, 5)) / 3
    pooled = PooledStatistics(
        sites={"a": PooledSite(slices=3, dice={"bright": 1 / 3, "dark": None})},
        moments=[PooledMoments(slices=3, mean=mean.tolist(), variance=(variance**2).tolist())],
        class_pixels=[7, 2],
        class_slices=[3, 1],
    )
    folder.keep_pooled(pooled)
    assert folder.pooled() == pooled
    path = folder.path / "statistics.json"
    path.write_bytes(path.read_bytes().replace(b'"slices":3', b'"slices":-3'))
    with pytest.raises(RunError, match=r"statistics\.json: moments\.0\.slices"):
        folder.pooled()


def test_whether_it_is_locked_can_be_asked_without_taking_the_lock(folder: RunFolder) -> None:
    assert not folder.is_locked()
    with folder.lock():
        assert folder.is_locked()
        assert folder.is_locked()
        with pytest.raises(RunError, match="another process"), folder.lock():
            pass
    assert not folder.is_locked()
