"""What a coordinator knows of its runs follows from their own folders."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dafne_federated.core.errors import FlowerError, LostRunError, RunError
from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.server import deployment_runs
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_runs import (
    active_run,
    all_runs,
    flower_number,
    is_finished,
    is_starting,
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


@pytest.mark.parametrize("last", ["launched", "started", "failed", "lost"])
def test_a_run_that_is_starting_or_healing_can_be_stopped_once(
    server: ServerFolder, start: Start, last: str
) -> None:
    run = start("run")
    run.event(last)
    stop_run(server, run)
    assert [event["event"] for event in run.events()] == [last, "stopped"]
    assert active_run(server) is None
    with pytest.raises(RunError, match="'run' is not started again: stopped by the coordinator"):
        launch(server, run, seen=1)
    with pytest.raises(RunError, match="'run' is not under way"):
        stop_run(server, run)


class Flower:
    """Flower's command line, as far as runs are known to it by number and status."""

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}
        self.answers = True

    def __call__(self, arguments: Sequence[str], _environment: object, _home: Path) -> Any:
        if arguments[0] == "run":
            number = str(len(self.runs) + 1)
            self.runs[number] = "pending"
            if not self.answers:
                msg = "'flwr run' gave no answer within 120 s"
                raise FlowerError(msg)
            return {"run-id": number}
        if arguments[0] == "stop":
            if self.runs.get(arguments[1], "finished").startswith("finished"):
                msg = "'flwr stop' failed: it is not running"
                raise FlowerError(msg)
            self.runs[arguments[1]] = "finished:stopped"
            return {}
        assert arguments[0] == "ls"
        return {"runs": [{"run-id": n, "status": status} for n, status in self.runs.items()]}


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    flower = Flower()
    monkeypatch.setattr(deployment_runs, "flwr", flower)
    return flower


def test_a_start_that_flower_took_without_an_answer_is_stopped_before_the_next(
    server: ServerFolder, start: Start, flower: Flower
) -> None:
    run = start("run")
    flower.answers = False
    with pytest.raises(FlowerError, match="gave no answer"):
        launch(server, run)
    flower.answers = True
    launch(server, run)
    assert flower.runs == {"1": "finished:stopped", "2": "pending"}
    assert flower_number(run) == "2"


def test_a_start_that_cannot_be_written_down_is_stopped(
    server: ServerFolder, start: Start, flower: Flower
) -> None:
    run = start("run")
    (run.path / "flower.json").mkdir()  # no file can take its place
    with pytest.raises(OSError, match=r"flower\.json"):
        launch(server, run)
    assert flower.runs == {"1": "finished:stopped"}
    assert list(run.events()) == []


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


def test_a_run_that_is_being_started_counts_as_under_way(
    server: ServerFolder, start: Start
) -> None:
    run = start("run")
    assert not is_starting(run)
    run.event("launched")
    run.event("lost", reason="said by whoever follows it, of an earlier start")
    assert is_starting(run)
    active = active_run(server)
    assert active is not None
    with pytest.raises(RunError, match="run 'run' is under way"):
        launch(server, start("second"))
    for kind in ("started", "failed", "stopped"):
        run.event("launched")
        run.event(kind)
        assert not is_starting(run)


def test_a_launch_long_ago_came_to_nothing(start: Start) -> None:
    run = start("run")
    (run.path / "events.jsonl").write_text('{"time": 1.0, "event": "launched"}\n')
    assert not is_starting(run)


def test_a_run_that_is_under_way_is_not_started_a_second_time(
    server: ServerFolder, start: Start
) -> None:
    run = start("run")
    run.event("started")
    with run.lock():
        for lost in (None, LostRunError("known to have ended", None)):
            launch(server, run, lost)  # no Flower here that could start anything
    run.event("launched")
    launch(server, run)
    assert [event["event"] for event in run.events()] == ["started", "launched"]
    with pytest.raises((RunError, OSError)):
        launch(server, run, LostRunError("known to have ended", None))
