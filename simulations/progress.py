"""Progress of a simulation on the terminal: one bar a stage, on standard error."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dafne_federated.core.run_folder import RunFolder
from dafne_federated.simulations.aggregation_words import percents

Advance = Callable[[str], None]


def epoch_note(loss: float, dice: float | None) -> str:
    """Return what to show of an epoch."""
    return f"loss {loss:.3f}" + ("" if dice is None else f", Dice {dice:.3f}")


class Stages:
    """Shows stages one under the other; ``quiet`` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            disable=quiet,
        )

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._progress.tasks:  # one that never began would print an empty line
            self._progress.stop()

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar while the block runs; the block calls what it gets after each step."""
        self._progress.start()  # only now: a display without a stage would print an empty line
        task = self._progress.add_task(name, total=total, note="")

        def advance(note: str = "") -> None:
            self._progress.update(task, advance=1, note=note)

        yield advance
        done = self._progress.tasks[task].completed
        self._progress.update(task, total=done or total, completed=done or total)

    @contextlib.contextmanager
    def federation(self, folder: RunFolder, sites: int) -> Iterator[None]:
        """Show the rounds of a federation while the block runs it, in whatever process."""
        rounds = folder.info().settings.rounds
        finished = len(folder.rounds())
        total = (rounds + 1 - finished) * sites
        ended = threading.Event()
        with self.stage("Federated rounds", total) as advance:

            def watch() -> None:
                seen = len(list(folder.events()))
                while True:
                    last = ended.wait(0.5)
                    news = list(folder.events())[seen:]
                    seen += len(news)
                    for event in news:
                        if event["event"] == "site answered":
                            advance(f"round {event['round']}: {event['site']}")
                        elif (error := event.get("aggregation_error")) and not self.quiet:
                            words = f"aggregation error {percents([error])}"
                            self._progress.console.print(f"round {event['round']}: {words}")
                    if last:
                        return

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
            finally:
                ended.set()
                watcher.join()
