"""A run is followed to its end, and started again when its program ends without a word."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dafne_federated.core.errors import FlowerError, LostRunError, RunError
from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.server import run_following
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_runs import stop_run
from dafne_federated.server.run_following import follow, watch


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    return ServerFolder(tmp_path)


@pytest.fixture
def run(server: ServerFolder, small_plan: AdaptationPlan) -> RunFolder:
    info = RunInfo(
        run="0" * 32, created=1, base_digest=sha256(b"base"), base_name="Base",
        plan_digest=small_plan.digest, settings=RunSettings(rounds=8), versions={}, command="",
    )  # fmt: skip
    return RunFolder.create(server.run_path("run"), info, small_plan, b"base")


def kinds(events: list[dict[str, object]]) -> list[object]:
    return [event["event"] for event in events]


def end_round(run: RunFolder) -> None:
    lines = [
        RoundLine(
            round=number, trained=number <= 8, sites={}, aggregation_error=None, state_digest="",
            seconds=1.0,
        )
        for number in range(1, len(run.rounds()) + 2)
    ]  # fmt: skip
    text = "".join(f"{line.model_dump_json()}\n" for line in lines)
    (run.path / "rounds.jsonl").write_text(text)


Starts = Callable[[list[Callable[[], None]]], list[LostRunError | None]]


@pytest.fixture
def starts(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Starts:
    """Let each start of the run do what is given, in place of Flower; the last one is repeated."""

    def choose(acts: list[Callable[[], None]]) -> list[LostRunError | None]:
        losses: list[LostRunError | None] = []

        def launch(
            _folder: ServerFolder, _run: RunFolder, lost: LostRunError | None, _seen: int
        ) -> None:
            losses.append(lost)
            acts[min(len(losses), len(acts)) - 1]()

        monkeypatch.setattr(run_following, "launch", launch)
        return losses

    return choose


def test_watching_ends_with_the_run(server: ServerFolder, run: RunFolder) -> None:
    run.event("stopped", reason="earlier")
    for kind in ("started", "finished"):
        run.event(kind)
    assert kinds(list(watch(server, run, 1))) == ["started", "finished"]


def test_a_run_that_stops_says_why_and_how_to_go_on(server: ServerFolder, run: RunFolder) -> None:
    run.event("started")
    run.event("stopped", reason="too few sites")
    with pytest.raises(RunError, match=r"too few sites; .* server resume .* run'") as caught:
        list(watch(server, run, 0))
    assert not isinstance(caught.value, LostRunError)


def test_a_program_that_vanished_is_noticed(server: ServerFolder, run: RunFolder) -> None:
    run.event("started")
    with pytest.raises(LostRunError, match="ended without a word"):
        list(watch(server, run, 0))


def test_a_run_that_loses_its_program_is_started_again(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    def fail() -> None:
        run.event("failed", reason="OSError: no space left")

    losses = starts([fail, fail, lambda: run.event("finished")])
    events = list(follow(server, run, pause=0.0))
    assert kinds(events) == ["failed", "lost", "failed", "lost", "finished"]
    assert events[1]["reason"].endswith("failed: OSError: no space left; it is started again")
    assert kinds(list(run.events())) == kinds(events)  # each was said once, and is kept
    assert [loss is None for loss in losses] == [True, False, False]


def test_it_is_given_up_after_some_starts_without_a_new_round(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    def go_on_and_fail() -> None:
        if len(run.rounds()) < 8:
            end_round(run)
        run.event("failed", reason="again")

    losses = starts([go_on_and_fail])
    with pytest.raises(RunError, match="6 times without a new round in between; see"):
        list(follow(server, run, pause=0.0))
    assert len(run.rounds()) == 8
    assert len(losses) == 8 + 6


def test_rounds_of_the_versions_of_a_generation_are_progress(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    made: list[RunFolder] = []

    def next_version_and_fail() -> None:
        if len(made) < 8:
            path = run.path / "versions" / f"{len(made) + 1:04d}"
            info = run.info().model_copy(update={"run": f"{len(made) + 1:032d}"})
            made.append(RunFolder.create(path, info, run.plan(), b"base"))
            (path / "continues.json").write_text("{}")
            end_round(made[-1])
        run.event("failed", reason="again")

    losses = starts([next_version_and_fail])
    with pytest.raises(RunError, match="6 times without a new round in between; see"):
        list(follow(server, run, pause=0.0))
    assert len(losses) == 8 + 6


def test_what_stopped_in_words_is_not_started_again(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    losses = starts([lambda: run.event("stopped", reason="too few sites")])
    with pytest.raises(RunError, match="too few sites"):
        list(follow(server, run, pause=0.0))
    assert len(losses) == 1


def test_a_superlink_that_is_away_is_waited_for(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    def away() -> None:
        raise FlowerError("nobody answers")

    starts([away, lambda: run.event("finished")])
    events = list(follow(server, run, pause=0.0))
    assert kinds(events) == ["lost", "finished"]
    assert events[0]["reason"] == "not started yet: nobody answers"


def test_a_run_that_is_stopped_while_it_is_not_started_yet_ends(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    def away() -> None:
        run.event("stopped", reason="stopped by people")
        raise FlowerError("nobody answers")

    losses = starts([away])
    with pytest.raises(RunError, match="stopped by people; see"):
        list(follow(server, run, pause=0.0))
    assert len(losses) == 1


def test_a_run_that_is_stopped_before_it_is_started_again_stays_so(
    server: ServerFolder, run: RunFolder
) -> None:
    run.event("launched")
    following = follow(server, run, pause=0.5)
    begun = threading.Timer(0.2, lambda: run.event("failed", reason="OSError: no space left"))
    begun.start()
    assert next(following)["event"] == "failed"
    begun.join()
    stop_run(server, run)
    with pytest.raises(RunError, match="stopped by the coordinator's people; see"):
        list(following)
    assert kinds(list(run.events())) == ["launched", "failed", "stopped", "lost"]


def test_a_run_whose_program_was_killed_before_its_last_word_is_finished(
    server: ServerFolder, run: RunFolder, starts: Starts
) -> None:
    def finish() -> None:
        for _ in range(9):
            end_round(run)
        run.finish(RunResult(released=False, reason="", round=None, base_dice={}, dice={}))
        run.event("failed", reason="killed")

    losses = starts([finish])
    assert kinds(list(follow(server, run, pause=0.0))) == ["failed"]
    assert len(losses) == 1


HOLD = """
import sys, time
from pathlib import Path
from dafne_federated.core.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.lock():
    run.event("started")
    time.sleep(100)
"""


def test_a_run_under_way_is_followed_and_taken_over_when_it_is_lost(
    server: ServerFolder, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_following, "_GONE", 0.5)
    monkeypatch.setattr(run_following, "_ASK", 0.0)
    asked_under_way = []

    def status(_folder: ServerFolder, run: RunFolder) -> str:
        asked_under_way.append(run.is_locked())
        return "running"

    monkeypatch.setattr(run_following, "flower_status", status)
    program = subprocess.Popen([sys.executable, "-P", "-c", HOLD, str(run.path)])
    while not list(run.events()) or not run.is_locked():
        assert program.poll() is None

    def launch(
        _folder: ServerFolder, run: RunFolder, lost: LostRunError | None, _seen: int
    ) -> None:
        if lost is not None:
            run.event("finished")

    monkeypatch.setattr(run_following, "launch", launch)
    killing = threading.Timer(1.0, lambda: program.send_signal(signal.SIGKILL))
    killing.start()
    assert kinds(list(follow(server, run, pause=0.0))) == ["lost", "finished"]
    program.wait()
    killing.join()
    assert not any(asked_under_way)  # it costs seconds, and would change nothing
