"""The table of a benchmark: each arm at each size, on development or on test persons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from dafne_federated.core.metrics import mean
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder
from dafne_federated.simulations.benchmark_records import FitLine, TestLine, read_lines
from dafne_federated.simulations.benchmark_run import chosen_fits
from dafne_federated.simulations.benchmark_statistics import (
    Difference,
    Interval,
    Line,
    dice_matrix,
    difference,
    holm,
    interval,
)

REFERENCE: Final = "central-scratch"


@dataclass(frozen=True)
class Row:
    """One arm at one size.

    Attributes:
        arm: Name of the arm.
        persons: Persons per site, 0 for all.
        seeds: How many.
        people: How many were measured.
        dice: Mean over persons and seeds; None without scores.
        held_out: The same for persons of a centre that took no part.
        gain: Against central scratch training at the same size; None for itself.
        held_out_gain: The same for a centre that took no part.
        passes: Over the training slices, until the kept epoch or round, mean over seeds.
        seconds: Until the same, all sites together, mean over seeds, in processor time. Other
            work on the machine makes it longer, which it does not do to ``passes``.
        megabytes: Sent until then; None where images would have to travel instead.
        parameters: Values that were trained.
        variant: Settings that were chosen.
    """

    arm: str
    persons: int
    seeds: int
    people: int
    dice: Interval | None
    held_out: Interval | None
    gain: Difference | None
    held_out_gain: Difference | None
    passes: float
    seconds: float
    megabytes: float | None
    parameters: int
    variant: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """The chosen fits of a benchmark, and their scores on the persons that are looked at.

    Attributes:
        fits: The fits.
        lines: By cell: the line with the scores.
        tested: Whether the scores are those of test persons; else of tuning persons.
    """

    fits: list[FitLine]
    lines: Mapping[str, Line]
    tested: bool

    def of(self, arm: str, persons: int) -> list[FitLine]:
        """Return the fits of an arm at a size, those of all folds among them."""
        return [fit for fit in self.fits if (fit.arm, fit.persons) == (arm, persons)]

    def scored(self, arm: str, persons: int) -> list[Line]:
        """Return the lines with the scores of an arm at a size, one for each seed.

        Where there are several folds, those of a seed are one line: each fold tests others. A
        seed that is not finished in all of them is left out.
        """
        by_seed: dict[int, Line] = {}
        for fit in self.of(arm, persons):
            line = self.lines.get(fit.cell)
            if line is not None:
                before = by_seed.get(line.seed)
                scores = (*(before.scores if before else ()), *line.scores)
                by_seed[line.seed] = line.model_copy(update={"scores": scores})
        most = max((len(line.scores) for line in by_seed.values()), default=0)
        return [line for line in by_seed.values() if len(line.scores) == most]


def measured(folder: BenchmarkFolder) -> Measured:
    """Return what was measured so far: on the test where it was made, else on tuning persons.

    Arms that were fitted in part and left out of the test are left out with it.
    """
    fits = chosen_fits(folder, folder.started())
    tests = {line.cell: line for line in read_lines(folder.final, TestLine)}
    if folder.tested_cells and folder.tested_cells <= tests.keys():
        fits = [fit for fit in fits if fit.cell in folder.tested_cells]
    tested = bool(fits) and all(fit.cell in tests for fit in fits)
    lines: Mapping[str, Line] = tests if tested else {fit.cell: fit for fit in fits}
    return Measured(fits, lines, tested)


def table(folder: BenchmarkFolder, found: Measured) -> list[Row]:
    """Return the rows of the scenario as it was started last, in its order."""
    scenario = folder.started().scenario
    rows = []
    for persons in scenario.sites.persons:
        own = []
        for arm in scenario.arms:
            # The base is the same at every size and was measured at one.
            size = scenario.sites.persons[0] if scenario.arms[arm].where == "base" else persons
            if found.of(arm, size):
                where = scenario.arms[arm].where
                moves = where in ("federated", "ensemble", "dafne-merge")
                row = _row(found, arm, size, persons, scenario.descriptive, moves)
                own.append(replace(row, persons=persons))
        rows += _corrected(own)
    return rows


def markdown(rows: Sequence[Row], tested: bool) -> str:
    """Return rows as a table."""
    who = "test" if tested else "tuning"
    against = [f"against {REFERENCE}", "p (Holm)"]
    head = ["persons per site", "arm", f"Dice, {who} persons", *against]
    head += ["Dice, centre that took no part", *against]
    head += ["passes", "s", "MB", "trained", "chosen"]
    found = []
    for row in rows:
        people = f" ({row.people} persons)"
        cells = [
            str(row.persons or "all"),
            row.arm,
            "-" if row.dice is None else interval_words(row.dice) + people,
            *_gain_words(row.gain),
            interval_words(row.held_out),
            *_gain_words(row.held_out_gain),
            f"{row.passes:.0f}",
            f"{row.seconds:.0f}",
            "-" if row.megabytes is None else f"{row.megabytes:.2f}",
            str(row.parameters),
            variant_words(row.variant),
        ]
        found.append(cells)
    return grid(head, found)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return cells as a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def variant_words(variant: Mapping[str, Any]) -> str:
    """Return e.g. ``rank 2, learning-rate 0.02``; empty where an arm stands as it is."""
    return ", ".join(f"{name} {value}" for name, value in variant.items())


def interval_words(found: Interval | None, signed: bool = False) -> str:
    """Return e.g. ``0.812 [0.790, 0.833]``."""
    if found is None:
        return "-"
    pattern = "{:+.3f}" if signed else "{:.3f}"
    ends = [found.low, found.high]
    if None in ends or any(math.isnan(end or 0.0) for end in ends):
        return pattern.format(found.mean)
    return pattern.format(found.mean) + f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def _gain_words(gain: Difference | None) -> tuple[str, str]:
    if gain is None:
        return "-", "-"
    p = "-" if gain.adjusted is None else p_words(gain.adjusted)
    return interval_words(gain.gain, signed=True), p


def p_words(p: float) -> str:
    """Return a p value in words."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _row(found: Measured, arm: str, size: int, persons: int, descriptive: bool, moves: bool) -> Row:
    fits, lines = found.of(arm, size), found.scored(arm, size)
    reference = found.scored(REFERENCE, persons) if arm != REFERENCE else []
    people, values = dice_matrix(lines)
    kept = [point for fit in fits if (point := fit.reached)]
    gains = [
        difference(lines, reference, held_out, descriptive) if lines and reference else None
        for held_out in (False, True)
    ]
    return Row(
        arm=arm,
        persons=persons,
        seeds=len({fit.seed for fit in fits}),
        people=len(people),
        dice=interval(values),
        held_out=interval(dice_matrix(lines, held_out=True)[1]),
        gain=gains[0],
        held_out_gain=gains[1],
        passes=mean([float(point.epoch) for point in kept]) or 0.0,
        seconds=mean([point.seconds for point in kept]) or 0.0,
        megabytes=mean([point.megabytes for point in kept]) if moves else None,
        parameters=fits[0].parameters,
        variant=fits[0].variant,
    )


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """Return rows of one size with p values corrected for being compared together."""
    adjusted = holm({row.arm: row.gain.p for row in rows if row.gain})
    others = holm({row.arm: row.held_out_gain.p for row in rows if row.held_out_gain})
    return [
        replace(
            row,
            gain=row.gain and replace(row.gain, adjusted=adjusted[row.arm]),
            held_out_gain=row.held_out_gain
            and replace(row.held_out_gain, adjusted=others[row.arm]),
        )
        for row in rows
    ]
