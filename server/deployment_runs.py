"""Runs of a coordinator: hand one to Flower, follow it to its end, stop it.

How a run goes stands in its own folder, which the ServerApp writes; Flower is asked only
whether that program still lives. Flower has no resume: a run that goes on is a new run of
Flower on the same folder.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.flower_bundle import write_app
from dafne_federated.core.flower_command import CONNECTION, flwr
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.deployment_folder import ServerFolder

_POLL = 0.5  # seconds between two looks at the run's folder
_ASK = 10.0  # seconds between two questions to Flower
_GONE = 3.0  # seconds without the lock after which the program of a run counts as gone

Event = dict[str, Any]


class FlowerRun(BaseModel):
    """Flower's own number of the run that last worked on a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str


def launch(folder: ServerFolder, run: RunFolder) -> int:
    """Let Flower run, or go on with, a run.

    Returns:
        How many events the run's folder held before; those after are of this start.

    Raises:
        RunError: Another run is under way, or Flower refused.
    """
    if active := active_run(folder):
        msg = f"run {active.path.name!r} is under way; wait for it or stop it first"
        raise RunError(msg)
    if is_finished(run):
        msg = f"run {run.path.name!r} is finished"
        raise RunError(msg)
    _stop_flower(folder, run)  # one whose program died counts as running for a minute
    seen = len(list(run.events()))
    with tempfile.TemporaryDirectory(prefix="dafne-run-") as scratch:
        write_app(Path(scratch), run.path)
        started = flwr(["run", scratch, CONNECTION], folder.environment, folder.home)
    number = FlowerRun(run_id=str(started["run-id"]))
    write_atomic(run.path / "flower.json", number.model_dump_json().encode())
    return seen


def follow(folder: ServerFolder, run: RunFolder, seen: int) -> Iterator[Event]:
    """Yield the events of a run as they happen, until it is finished.

    Args:
        folder: The coordinator.
        run: The run.
        seen: Events to leave out; see ``launch``.

    Raises:
        RunError: It ended otherwise; in words, why.
    """
    asked = gone = time.monotonic()
    begun = False
    while True:
        events = list(run.events())[seen:]
        seen += len(events)
        for event in events:
            yield event
            if event["event"] == "finished":
                return
            if event["event"] == "stopped":
                raise RunError(f"{event['reason']}; {_hint(folder, run)}")
            begun = begun or event["event"] == "started"
        now = time.monotonic()
        if not begun or run.is_locked():
            gone = now
        elif now - gone > _GONE:
            msg = "the program of the run ended without a word, perhaps for want of memory"
            raise RunError(f"{msg}; {_hint(folder, run)}")
        if now - asked > _ASK:
            asked = now
            if (status := _flower_status(folder, run)).startswith("finished"):
                time.sleep(_POLL)
                if not list(run.events())[seen:]:
                    msg = f"Flower ended the run as {status}; {_hint(folder, run)}"
                    raise RunError(msg)
        time.sleep(_POLL)


def stop_run(folder: ServerFolder, run: RunFolder) -> None:
    """Stop a run that is under way; it can be resumed after its last finished round.

    Sites end what they are doing; nobody waits for it.

    Raises:
        RunError: It is not under way, or did not end within a minute.
    """
    if not run.is_locked():
        msg = f"run {run.path.name!r} is not under way"
        raise RunError(msg)
    run.event("stopped", reason="stopped by the coordinator's people")
    _stop_flower(folder, run)
    end = time.monotonic() + 60.0
    while run.is_locked():
        if time.monotonic() > end:
            msg = f"run {run.path.name!r} did not end within a minute; see {folder.logs}"
            raise RunError(msg)
        time.sleep(_POLL)


def all_runs(folder: ServerFolder) -> list[RunFolder]:
    """Return all runs of a coordinator, the oldest first."""
    found = [RunFolder(path.parent) for path in folder.runs.glob("*/run.json")]
    return sorted(found, key=lambda run: (run.info().created, run.path.name))


def active_run(folder: ServerFolder) -> RunFolder | None:
    """Return the run that is under way, or None."""
    return next((run for run in all_runs(folder) if run.is_locked()), None)


def is_finished(run: RunFolder) -> bool:
    """Return whether a run came to its end, with a release or without."""
    rounds = run.rounds()
    whole = bool(rounds) and rounds[-1].round > run.info().settings.rounds
    return whole and (run.path / "result.json").exists()


def _stop_flower(folder: ServerFolder, run: RunFolder) -> None:
    if number := _flower_run(run):
        with contextlib.suppress(RunError):  # it ended long ago
            flwr(["stop", number, CONNECTION], folder.environment, folder.home)


def _flower_status(folder: ServerFolder, run: RunFolder) -> str:
    number = _flower_run(run) or ""
    try:
        listed = flwr(["ls", CONNECTION, "--run-id", number], folder.environment, folder.home)
    except RunError:  # the SuperLink is being started again
        return "unknown"
    return str(listed["runs"][0]["status"]) if listed.get("runs") else "unknown"


def _flower_run(run: RunFolder) -> str | None:
    try:
        data = (run.path / "flower.json").read_bytes()
        return FlowerRun.model_validate_json(data).run_id
    except (OSError, ValidationError):
        return None


def _hint(folder: ServerFolder, run: RunFolder) -> str:
    resume = f"'dafne-federated server resume {folder.path} {run.path.name}'"
    return f"see {folder.logs / 'runs.log'}; go on with {resume}"
