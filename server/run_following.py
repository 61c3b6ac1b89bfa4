"""Follow a run to its end, and start its program again when that ends without a word.

A run is over when its program says so: finished, or stopped for a reason in words. Whatever
else ends the program (a kill, a full disk, a lost SuperLink, Flower's own opinion that it is
dead) leaves a run that goes on after its last finished round, and ends in the same bits. So it
is started again: as often as it makes progress, and a few times without. Who follows may end at
any time; the run goes on, and the next who follows takes over.
"""

import contextlib
import time
from collections.abc import Iterator

import tenacity

from dafne_federated.core.errors import FlowerError, LostRunError, RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_runs import (
    START_WAIT,
    Event,
    flower_number,
    flower_status,
    is_finished,
    launch,
)
from dafne_federated.server.generation import versions

_POLL = 0.5  # seconds between two looks at the run's folder
_ASK = 10.0  # seconds between two questions to Flower
_GONE = 3.0  # seconds without the lock after which the program of a run counts as gone
_TRIES = 6  # starts without a new round in between
_PAUSE = 2.0  # seconds before the second of them; then twice as long each time
_PASSING = (FlowerError, OSError)  # what may be over when a start is tried again
_AWAY = 600.0  # seconds that the SuperLink, or room on the disk, is waited for


def follow(folder: ServerFolder, run: RunFolder, pause: float = _PAUSE) -> Iterator[Event]:
    """Start a run, or find it under way, and yield its events as they happen, until its end.

    Args:
        folder: The coordinator.
        run: The run.
        pause: Seconds before the second start without a new round; then twice as long each time.

    Raises:
        RunError: Another run is under way, or this one was stopped or ended otherwise; in words,
            why.
    """
    seen, tries = len(list(run.events())), 0
    lost: LostRunError | None = None
    while True:
        done = _rounds_done(run)
        for attempt in _patiently():
            with attempt:
                launch(folder, run, lost, seen)
            outcome = attempt.retry_state.outcome
            if outcome and outcome.failed:
                if isinstance(outcome.exception(), _PASSING):
                    _tell(run, f"not started yet: {outcome.exception()}")
                for event in list(run.events())[seen:]:
                    seen += 1
                    yield event
                    _require_not_stopped(folder, run, event)
        try:
            for event in watch(folder, run, seen):
                seen += 1
                yield event
            return
        except LostRunError as error:
            lost = error
        if is_finished(run):  # all but the last word was said
            return
        tries = 0 if _rounds_done(run) != done else tries + 1
        if tries == _TRIES:
            msg = f"{lost}, {tries} times without a new round in between"
            raise RunError(f"{msg}; {hint(folder, run)}") from None
        _tell(run, f"{lost}; it is started again")
        time.sleep(pause * 2 ** (tries - 1) if tries else 0.0)


def watch(folder: ServerFolder, run: RunFolder, seen: int) -> Iterator[Event]:
    """Yield the events of one start of a run, until the run is finished.

    Args:
        folder: The coordinator.
        run: The run.
        seen: Events to leave out: those that the run's folder held before this start.

    Raises:
        RunError: The run stopped; in words, why.
        LostRunError: Its program ended without a word.
    """
    number = flower_number(run)
    begun = run.is_locked()
    begin = asked = gone = time.monotonic()
    while True:
        for event in list(run.events())[seen:]:
            seen += 1
            yield event
            if event["event"] == "finished":
                return
            _require_not_stopped(folder, run, event)
            if event["event"] == "failed":
                raise LostRunError(f"the program of the run failed: {event['reason']}", number)
            begun = begun or event["event"] == "started"
        now = time.monotonic()
        if run.is_locked() or not begun:
            gone = now
        elif now - gone > _GONE:
            msg = "the program of the run ended without a word, perhaps for want of memory"
            raise LostRunError(msg, number)
        if not begun and now - begin > START_WAIT:
            msg = f"the program of the run did not begin within {START_WAIT:g} s"
            raise LostRunError(msg, number)
        # Whoever holds the lock works on it, whatever Flower thinks, or will soon let it go. So
        # Flower is not asked then: its command takes seconds, in which the end would not be seen.
        if now - asked > _ASK and not run.is_locked():
            asked = now
            status = flower_status(folder, run)
            said = list(run.events())[seen:]
            if status.startswith("finished") and not said and not run.is_locked():
                raise LostRunError(f"Flower ended the run as {status}", number)
        time.sleep(_POLL)


def hint(folder: ServerFolder, run: RunFolder) -> str:
    """Return where to read more of a run, and how to go on with it."""
    resume = f"'dafne-federated server resume {folder.path} {run.path.name}'"
    return f"see {folder.logs / 'runs.log'}; go on with {resume}"


def _require_not_stopped(folder: ServerFolder, run: RunFolder, event: Event) -> None:
    if event["event"] == "stopped":
        msg = f"{event['reason']}; {hint(folder, run)}"
        raise RunError(msg)


def _rounds_done(run: RunFolder) -> dict[str, int]:
    """Return the finished rounds of a run and, of a generation, of each of its versions."""
    return {own.info().run: len(own.rounds()) for own in (run, *versions(run))}


def _patiently() -> tenacity.Retrying:
    """Return attempts for as long as a SuperLink may be away or a disk full."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_PASSING),
        stop=tenacity.stop_after_delay(_AWAY),
        wait=tenacity.wait_exponential(min=1.0, max=30.0),
        reraise=True,
    )


def _tell(run: RunFolder, reason: str) -> None:
    with contextlib.suppress(OSError):  # no room for it on the disk
        run.event("lost", reason=reason)
