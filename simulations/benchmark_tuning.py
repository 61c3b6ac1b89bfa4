"""How each arm's settings were chosen: all that was tried, and what it reached."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dafne_federated.core.metrics import mean
from dafne_federated.simulations.benchmark_cells import (
    cell_key,
    chosen_variant,
    first_cells,
    groups,
    person_means,
)
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder
from dafne_federated.simulations.benchmark_records import FitLine, read_lines
from dafne_federated.simulations.benchmark_table import grid, variant_words


@dataclass(frozen=True)
class Tried:
    """One variant of an arm, with the first seed.

    Attributes:
        arm: Name of the arm.
        persons: Persons per site, 0 for all.
        fold: Name of the fold.
        variant: Settings that differ from the arm's own.
        dice: Mean of the tuning persons; None where there are none.
        seconds: Until the epoch or round that was kept, in processor time.
        megabytes: Sent until then.
        chosen: Whether the other seeds were fitted with it.
    """

    arm: str
    persons: int
    fold: str
    variant: dict[str, Any]
    dice: float | None
    seconds: float
    megabytes: float
    chosen: bool


def tried_settings(folder: BenchmarkFolder) -> list[Tried]:
    """Return the variants of the arms that have several, of the groups that were chosen in."""
    started = folder.started()
    known = {line.cell: line for line in read_lines(folder.results, FitLine)}
    found = []
    for group in groups(started.scenario):
        cells = first_cells(started.scenario, group)
        keys = [cell_key(started.scenario, cell, started.data_digest) for cell in cells]
        lines = [known[key] for key in keys if key in known]
        if len(lines) < len(keys) or len(lines) < 2:
            continue
        best = chosen_variant(lines)
        for line in lines:
            kept = line.reached
            found.append(
                Tried(
                    arm=group.arm,
                    persons=group.persons,
                    fold=line.fold,
                    variant=line.variant,
                    dice=mean(list(person_means(line.scores).values())),
                    seconds=kept.seconds if kept else 0.0,
                    megabytes=kept.megabytes if kept else 0.0,
                    chosen=line is best,
                )
            )
    return found


def tuning_markdown(tried: Sequence[Tried]) -> str:
    """Return what was tried as a table; empty if no arm had a choice."""
    if not tried:
        return ""
    folds = len({one.fold for one in tried}) > 1
    head = ["persons per site", "arm", *(["fold"] if folds else []), "tried"]
    head += ["Dice, tuning persons", "s", "MB", "chosen"]
    rows = [
        [
            str(one.persons or "all"),
            one.arm,
            *([one.fold] if folds else []),
            variant_words(one.variant) or "as it stands",
            "-" if one.dice is None else f"{one.dice:.3f}",
            f"{one.seconds:.0f}",
            f"{one.megabytes:.2f}" if one.megabytes else "-",
            "yes" if one.chosen else "",
        ]
        for one in tried
    ]
    return grid(head, rows)
