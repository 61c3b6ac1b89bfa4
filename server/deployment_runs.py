"""Runs of a coordinator: hand one to Flower, find the one that is under way, stop it.

How a run goes stands in its own folder, which the ServerApp writes; Flower is asked only
whether that program still lives. Flower has no resume: a run that goes on is a new run of
Flower on the same folder.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dafne_federated.core.errors import FlowerError, LostRunError, RunError
from dafne_federated.core.files import locked, write_atomic
from dafne_federated.core.flower_bundle import write_app
from dafne_federated.core.flower_command import CONNECTION, flwr
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.deployment_folder import ServerFolder

START_WAIT = 180.0  # seconds from the launch of a run to the first word of its program
_POLL = 0.5  # seconds between two looks at the run's folder

Event = dict[str, Any]


class FlowerRun(BaseModel):
    """Flower's own number of the run that last worked on a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str


def launch(
    folder: ServerFolder,
    run: RunFolder,
    lost: LostRunError | None = None,
    seen: int | None = None,
) -> None:
    """Let Flower run, or go on with, a run; one that is under way is left as it is.

    Args:
        folder: The coordinator.
        run: The run.
        lost: A start of it that is known to have ended.
        seen: How many of its events the caller knows; where it was stopped after these, it is not
            started. None for all.

    Raises:
        RunError: Another run is under way, or this one is finished or was stopped meanwhile.
        FlowerError: Flower refused, or its SuperLink is away.
        OSError: No room to write down what was started; it is stopped again.
    """
    with locked(folder.launch_lock):
        if is_finished(run):
            msg = f"run {run.path.name!r} is finished"
            raise RunError(msg)
        for event in list(run.events())[seen:] if seen is not None else ():
            if event["event"] == "stopped":
                msg = f"run {run.path.name!r} is not started again: {event['reason']}"
                raise RunError(msg)
        active = require_no_other(folder, run)
        known_to_have_ended = lost is not None and lost.number == flower_number(run)
        if active and (run.is_locked() or not known_to_have_ended):
            return
        _stop_flower(folder, run)  # one whose program died counts as running for a minute
        _stop_unknown(folder)
        with tempfile.TemporaryDirectory(prefix="dafne-run-") as scratch:
            write_app(Path(scratch), run.path)
            started = flwr(["run", scratch, CONNECTION], folder.environment, folder.home)
        number = FlowerRun(run_id=str(started["run-id"]))
        try:
            write_atomic(run.path / "flower.json", number.model_dump_json().encode())
            run.event("launched")
        except OSError:
            _stop_number(folder, number.run_id)
            raise


def stop_run(folder: ServerFolder, run: RunFolder) -> None:
    """Stop a run that is under way; it can be resumed after its last finished round.

    One that is being started, or that lost its program and would be started again, is stopped
    too. Sites end what they are doing; nobody waits for it.

    Raises:
        RunError: It is not under way, or did not end within a minute.
    """
    with locked(folder.launch_lock):  # so that no start comes in between
        if not run.is_locked() and (not _goes_on(run) or is_finished(run)):
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
    """Return the run that is under way or being started, or None."""
    runs = all_runs(folder)
    return next((run for run in runs if run.is_locked() or is_starting(run)), None)


def require_no_other(folder: ServerFolder, run: RunFolder) -> RunFolder | None:
    """Return the run if it is under way or being started, else None.

    Raises:
        RunError: Another one is.
    """
    if (active := active_run(folder)) and active.path != run.path:
        msg = f"run {active.path.name!r} is under way; wait for it or stop it first"
        raise RunError(msg)
    return active


def is_starting(run: RunFolder) -> bool:
    """Return whether Flower was told to start a run and its program has not said anything yet."""
    last: Event = {}
    for event in run.events():
        if event["event"] in ("launched", "started", "failed", "stopped", "finished"):
            last = event
    recent = time.time() - float(last.get("time", 0.0)) < START_WAIT
    return last.get("event") == "launched" and recent


def is_finished(run: RunFolder) -> bool:
    """Return whether a run came to its end, with a release or without."""
    rounds = run.rounds()
    whole = bool(rounds) and rounds[-1].round > run.info().settings.rounds
    return whole and (run.path / "result.json").exists()


def flower_status(folder: ServerFolder, run: RunFolder) -> str:
    """Return what Flower says of the program of a run, such as ``finished:failed``."""
    number = flower_number(run) or ""
    try:
        listed = flwr(["ls", CONNECTION, "--run-id", number], folder.environment, folder.home)
    except FlowerError:  # the SuperLink is being started again
        return "unknown"
    return str(listed["runs"][0]["status"]) if listed.get("runs") else "unknown"


def flower_number(run: RunFolder) -> str | None:
    """Return Flower's own number of the run that last worked on a folder."""
    try:
        data = (run.path / "flower.json").read_bytes()
        return FlowerRun.model_validate_json(data).run_id
    except (OSError, ValidationError):
        return None


def _goes_on(run: RunFolder) -> bool:
    """Return whether a run was begun and has not come to an end in words."""
    last = ""
    for event in run.events():
        if event["event"] in ("launched", "started", "failed", "lost", "stopped", "finished"):
            last = event["event"]
    return last not in ("", "stopped", "finished")


def _stop_flower(folder: ServerFolder, run: RunFolder) -> None:
    if number := flower_number(run):
        _stop_number(folder, number)


def _stop_unknown(folder: ServerFolder) -> None:
    """Stop what Flower accepted and nobody wrote down: it gave no answer in time, or we died."""
    listed = flwr(["ls", CONNECTION], folder.environment, folder.home)
    known = {flower_number(run) for run in all_runs(folder)}
    for entry in listed.get("runs", []):
        if not str(entry["status"]).startswith("finished") and entry["run-id"] not in known:
            _stop_number(folder, entry["run-id"])


def _stop_number(folder: ServerFolder, number: str) -> None:
    with contextlib.suppress(FlowerError):  # it ended long ago
        flwr(["stop", number, CONNECTION], folder.environment, folder.home)
