"""What a site's optimiser knew after each round, kept at the site from one round to the next."""

import logging
from dataclasses import dataclass
from pathlib import Path

from dafne_federated.core.errors import StateError
from dafne_federated.core.optimiser_state import (
    AdamState,
    carried_over,
    load_optimiser,
    save_optimiser,
)
from dafne_federated.core.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimiserFiles:
    """Files of one site in one run, for rounds that train the same factors.

    A round that is asked for again starts where it started: from the end of the last round
    before it. What later or broken off attempts left is never read.

    Attributes:
        folder: Where they lie; one file for each of the last two rounds.
    """

    folder: Path

    def before(self, number: int, state: State) -> AdamState | None:
        """Return what the optimiser knows when round ``number`` starts from ``state``.

        None, for a fresh one, if the site trained in no earlier round, or if what it kept
        cannot be used; the log says so.
        """
        earlier = [path for path in self._paths() if _round(path) < number]
        if not earlier:
            log.info("round %d: a fresh optimiser: there is no earlier round", number)
            return None
        try:
            return carried_over(load_optimiser(max(earlier)), state)
        except StateError as error:
            log.warning("round %d: a fresh optimiser: %s", number, error)
            return None

    def keep(self, number: int, adam: AdamState) -> None:
        """Keep what the optimiser knew at the end of round ``number``, and of the one before."""
        for path in sorted(path for path in self._paths() if _round(path) < number)[:-1]:
            path.unlink()
        save_optimiser(self.folder / f"round-{number:04d}.npz", adam)

    def _paths(self) -> list[Path]:
        return list(self.folder.glob("round-*.npz"))


def _round(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
