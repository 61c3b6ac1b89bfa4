"""The table of a benchmark: each arm at each size, on development or on test persons."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dafne_federated.core.metrics import mean
from dafne_federated.simulations.benchmark_cells import person_means
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder
from dafne_federated.simulations.benchmark_records import FitLine, Score, TestLine, read_lines
from dafne_federated.simulations.benchmark_run import chosen_fits


@dataclass(frozen=True)
class Row:
    """One arm at one size.

    Attributes:
        arm: Name of the arm.
        persons: Persons per site, 0 for all.
        seeds: How many.
        people: How many were measured.
        dice: Mean over persons of the mean over seeds; None without scores.
        held_out: The same for persons of a centre that took no part.
        seconds: Until the kept epoch or round, all sites together, mean over seeds.
        cpu_seconds: Of the whole fit, mean over seeds.
        megabytes: Sent until the kept round, mean over seeds.
        parameters: Values that were trained.
        variant: Settings that were chosen.
    """

    arm: str
    persons: int
    seeds: int
    people: int
    dice: float | None
    held_out: float | None
    seconds: float
    cpu_seconds: float
    megabytes: float
    parameters: int
    variant: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def table(folder: BenchmarkFolder, tested: bool = False) -> list[Row]:
    """Return the rows of the scenario as it was started last, in its order.

    Args:
        folder: The benchmark.
        tested: Whether to show test persons; else tuning persons.
    """
    started = folder.started()
    fits = chosen_fits(folder, started)
    tests = {line.cell: line for line in read_lines(folder.final, TestLine)} if tested else None
    rows = []
    for persons in started.scenario.sites.persons:
        for arm in started.scenario.arms:
            lines = [line for line in fits if (line.arm, line.persons) == (arm, persons)]
            if lines:
                rows.append(_row(lines, tests))
    return rows


def by_person(lines: Sequence[FitLine | TestLine], held_out: bool = False) -> dict[str, float]:
    """Return the Dice of each person: the mean over seeds of the mean over labels."""
    each: dict[str, list[float | None]] = {}
    for line in lines:
        scores: list[Score] = [score for score in line.scores if score.held_out is held_out]
        for person, value in person_means(scores).items():
            each.setdefault(person, []).append(value)
    return {person: mean(values) or 0.0 for person, values in each.items()}


def markdown(rows: Sequence[Row]) -> str:
    """Return rows as a table."""
    head = ["arm", "persons", "seeds", "Dice", "no part", "s", "s CPU", "MB", "trained", "chosen"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row.arm,
            str(row.persons or "all"),
            str(row.seeds),
            _shown(row.dice),
            _shown(row.held_out),
            f"{row.seconds:.0f}",
            f"{row.cpu_seconds:.0f}",
            f"{row.megabytes:.2f}",
            str(row.parameters),
            ", ".join(f"{key} {value}" for key, value in row.variant.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(fits: Sequence[FitLine], tests: dict[str, TestLine] | None) -> Row:
    lines: list[FitLine | TestLine] = list(fits)
    if tests is not None:
        lines = [tests[fit.cell] for fit in fits if fit.cell in tests]
    persons, others = by_person(lines), by_person(lines, held_out=True)
    kept = [fit.curve[max(fit.kept, 0)] for fit in fits if fit.curve]
    return Row(
        arm=fits[0].arm,
        persons=fits[0].persons,
        seeds=len({fit.seed for fit in fits}),
        people=len(persons),
        dice=mean(list(persons.values())),
        held_out=mean(list(others.values())),
        seconds=mean([point.seconds for point in kept]) or 0.0,
        cpu_seconds=mean([fit.cpu_seconds for fit in fits]) or 0.0,
        megabytes=mean([point.megabytes for point in kept]) or 0.0,
        parameters=fits[0].parameters,
        variant=fits[0].variant,
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
