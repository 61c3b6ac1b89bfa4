"""What a coordinator says of a run follows from the run's own folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_runs import (
    active_run,
    all_runs,
    follow,
    is_finished,
    launch,
    stop_run,
)

Start = Callable[..., RunFolder]


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    return ServerFolder(tmp_path)


@pytest.fixture
def start(server: ServerFolder, small_plan: AdaptationPlan) -> Start:
    def make(name: str, created: int = 1) -> RunFolder:
        info = RunInfo(
            run="0" * 32, created=created, base_digest=sha256(b"base"), base_name="Base",
            plan_digest=small_plan.digest, settings=RunSettings(rounds=1), versions={}, command="",
        )  # fmt: skip
        return RunFolder.create(server.run_path(name), info, small_plan, b"base")

    return make


def finish(run: RunFolder) -> None:
    text = "".join(
        RoundLine(
            round=number, trained=number == 1, sites={}, aggregation_error=None, state_digest="",
            seconds=1.0,
        ).model_dump_json()
        + "\n"
        for number in (1, 2)
    )  # fmt: skip
    (run.path / "rounds.jsonl").write_text(text)
    run.finish(RunResult(released=False, reason="", round=None, base_dice={}, dice={}))


def test_runs_are_in_the_order_of_their_start(server: ServerFolder, start: Start) -> None:
    assert all_runs(server) == []
    later, earlier = start("a", 2), start("b", 1)
    assert [run.path for run in all_runs(server)] == [earlier.path, later.path]


def test_one_run_at_a_time(server: ServerFolder, start: Start) -> None:
    first, second = start("first"), start("second")
    with first.lock():
        active = active_run(server)
        assert active is not None
        assert active.path == first.path
        with pytest.raises(RunError, match="run 'first' is under way"):
            launch(server, second)
    assert active_run(server) is None
    with pytest.raises(RunError, match="'first' is not under way"):
        stop_run(server, first)


def test_a_run_is_finished_with_its_last_evaluation_and_result(
    server: ServerFolder, start: Start
) -> None:
    run = start("run")
    assert not is_finished(run)
    finish(run)
    assert is_finished(run)
    with pytest.raises(RunError, match="is finished"):
        launch(server, run)
    (run.path / "result.json").unlink()
    assert not is_finished(run)


def test_following_ends_with_the_run(server: ServerFolder, start: Start) -> None:
    run = start("run")
    run.event("stopped", reason="earlier")
    for kind in ("started", "finished"):
        run.event(kind)
    events = list(follow(server, run, 1))
    assert [event["event"] for event in events] == ["started", "finished"]


def test_a_run_that_stops_says_why_and_how_to_go_on(server: ServerFolder, start: Start) -> None:
    run = start("run")
    run.event("started")
    run.event("stopped", reason="too few sites")
    with pytest.raises(RunError, match=r"too few sites; .* server resume .* run'"):
        list(follow(server, run, 0))


def test_a_program_that_vanished_is_noticed(server: ServerFolder, start: Start) -> None:
    run = start("run")
    run.event("started")
    with pytest.raises(RunError, match="ended without a word"):
        list(follow(server, run, 0))
