"""The report of a benchmark: one HTML file with nothing to load, for the machine it ran on.

It shows slices of persons; what is kept and passed on are lines and tables without any.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dafne_federated.core.dataset import load_case, open_folder
from dafne_federated.core.files import write_atomic
from dafne_federated.core.metrics import mean
from dafne_federated.core.volumes import Case, orientation
from dafne_federated.simulations.benchmark_cells import person_means
from dafne_federated.simulations.benchmark_figures import arm_style, dice_against, dice_by_persons
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder
from dafne_federated.simulations.benchmark_records import BaseLine, FitLine, read_lines
from dafne_federated.simulations.benchmark_statistics import Line
from dafne_federated.simulations.benchmark_table import (
    REFERENCE,
    Measured,
    Row,
    interval_words,
    measured,
    p_words,
    table,
)
from dafne_federated.simulations.benchmark_verdict import benchmark_verdict
from dafne_federated.simulations.figures import Picture, line_swatch
from dafne_federated.simulations.overlay_pictures import label_swatch, overlay_pictures, upright
from dafne_federated.simulations.report import report_environment
from dafne_federated.simulations.test_results import Overlay

_WORST: Final = 4  # persons shown
_SHOWN: Final = 4  # arms shown of each


@dataclass(frozen=True)
class Breakdown:
    """Dice by label and by site, of one size.

    Attributes:
        persons: Persons per site, 0 for all.
        heads: Names of the columns.
        rows: By arm, a figure for each column; None where nothing was measured.
    """

    persons: int
    heads: tuple[str, ...]
    rows: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Worst:
    """A person on whom an arm did badly.

    Attributes:
        overlay: The slice.
        persons: Persons per site in the fits that are shown.
        dice: Of the person, by ``truth`` and arm; the first has none.
        pictures: By the same names.
        turned: Whether directions are known.
    """

    overlay: Overlay
    persons: int
    dice: Mapping[str, float]
    pictures: Mapping[str, Picture]
    turned: bool


def write_benchmark_report(folder: BenchmarkFolder) -> Path:
    """Write the page of a benchmark from what lies in its folder, and return its path.

    What is not there yet is left out; the same folder gives the same bytes.

    Raises:
        DafneFederatedError: This is not the folder of a benchmark, or a file is damaged.
    """
    started = folder.started()
    scenario, found = started.scenario, measured(folder)
    rows = table(folder, found)
    arms = list(scenario.arms)
    drawn = [arm for arm in arms if any(row.arm == arm for row in rows)]
    labels = _labels(found)
    page = {
        "started": started,
        "scenario": scenario,
        "rows": rows,
        "tested": found.tested,
        "reference": REFERENCE,
        "verdict": benchmark_verdict(scenario, rows, found.tested),
        "legend": {arm: line_swatch(arm_style(arms.index(arm))) for arm in drawn},
        "by_persons": dice_by_persons(rows, arms),
        "by_persons_held_out": dice_by_persons(rows, arms, held_out=True),
        "charts": _charts(found, arms, scenario.sites.persons),
        "by_label": _breakdowns(found, arms, scenario.sites.persons, "label"),
        "by_site": _breakdowns(found, arms, scenario.sites.persons, "site"),
        "worst": _worst(folder, found, rows) if found.tested else [],
        "label_legend": {label: label_swatch(n) for n, label in enumerate(labels, start=1)},
        "bases": _last_bases(read_lines(folder.results, BaseLine)),
        "fits": found.fits,
        "info": found.fits[0] if found.fits else {"versions": {}},
        "interval": interval_words,
        "p": p_words,
    }
    html = report_environment().get_template("benchmark_report.html.jinja").render(page)
    write_atomic(folder.report, html.encode())
    return folder.report


def _charts(
    found: Measured, arms: Sequence[str], sizes: Sequence[int]
) -> list[tuple[int, list[Picture]]]:
    charts = []
    for persons in sizes:
        fits = {arm: found.of(arm, persons) for arm in arms}
        moved = {arm: own for arm, own in fits.items() if own and own[0].curve}
        moved = {arm: own for arm, own in moved.items() if own[0].curve[-1].megabytes > 0}
        pictures = [
            dice_against("epoch", fits, arms),
            dice_against("seconds", fits, arms),
            dice_against("longest", fits, arms),
            dice_against("megabytes", moved, arms),
        ]
        charts.append((persons, [one for one in pictures if one is not None]))
    return charts


def _breakdowns(
    found: Measured, arms: Sequence[str], sizes: Sequence[int], by: str
) -> list[Breakdown]:
    """Return the mean Dice by label, or by site of the person, of each arm at each size."""
    tables = []
    for persons in sizes:
        lines = {arm: found.scored(arm, persons) for arm in arms}
        scores = [score for own in lines.values() for line in own for score in line.scores]
        heads = tuple(dict.fromkeys(getattr(score, by) for score in scores))
        shown = {
            arm: tuple(_part(own, by, head) for head in heads) for arm, own in lines.items() if own
        }
        if heads and shown:
            tables.append(Breakdown(persons, heads, shown))
    return tables


def _part(lines: Sequence[Line], by: str, value: str) -> float | None:
    each: list[float | None] = []
    for line in lines:
        scores = [score for score in line.scores if getattr(score, by) == value]
        each.append(mean(list(person_means(scores).values())))
    return mean(each)


def _worst(folder: BenchmarkFolder, found: Measured, rows: Sequence[Row]) -> list[Worst]:
    """Return test persons with the lowest Dice of the first federated arm, at the first size."""
    scenario = folder.started().scenario
    persons = scenario.sites.persons[0]
    pooled = [arm for arm, own in scenario.arms.items() if own.where != "local"]
    here = [arm for arm in pooled if found.of(arm, persons)]
    federated = [arm for arm in here if scenario.arms[arm].where == "federated"]
    main = (federated or here)[-1:]
    if not main:
        return []
    order = [REFERENCE, *main, *(arm for arm in here if arm not in (REFERENCE, *main))]
    shown = [arm for arm in order if arm in here][:_SHOWN]
    first = {arm: _first_seed(found.of(arm, persons)) for arm in shown}
    means = {arm: _means(found, fits) for arm, fits in first.items()}
    lowest = sorted(means[main[0]], key=lambda person: means[main[0]][person])[:_WORST]
    images = open_folder(folder.images(folder.started()) / "images")
    views = []
    for person in lowest:
        ref = next(ref for ref in images.cases if ref.person == person)
        masks = {arm: _drawn(folder, fits, ref.name) for arm, fits in first.items()}
        drawn = {arm: mask for arm, mask in masks.items() if mask is not None}
        overlay = _overlay(load_case(ref, images.labels), list(images.labels.values()), drawn)
        views.append(
            Worst(
                overlay=overlay,
                persons=persons,
                dice={arm: means[arm][person] for arm in drawn if person in means[arm]},
                pictures=overlay_pictures(overlay),
                turned=bool(upright(overlay).orientation),
            )
        )
    return views


def _first_seed(fits: Sequence[FitLine]) -> list[FitLine]:
    seed = fits[0].seed
    return [fit for fit in fits if fit.seed == seed]


def _means(found: Measured, fits: Sequence[FitLine]) -> dict[str, float]:
    scores = [score for fit in fits for score in found.lines[fit.cell].scores]
    return dict(person_means(scores))


def _drawn(folder: BenchmarkFolder, fits: Sequence[FitLine], case: str) -> NDArray[np.uint8] | None:
    for fit in fits:
        path = folder.pictures(fit.cell)
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                if case in arrays.files:
                    return np.array(arrays[case], np.uint8)
    return None


def _overlay(case: Case, labels: Sequence[str], drawn: dict[str, NDArray[np.uint8]]) -> Overlay:
    marked = np.sum([mask.sum(axis=(0, 1)) for mask in case.masks.values()], axis=0)
    index = int(np.argmax(marked))
    truth = np.zeros(case.image.shape[:2], np.uint8)
    for number, label in enumerate(labels, start=1):
        if label in case.masks:
            truth[case.masks[label][..., index]] = number
    return Overlay(
        site=case.site,
        person=case.person,
        case=case.name,
        slice_index=index,
        image=case.image[..., index],
        truth=truth,
        predictions=drawn,
        spacing=np.array(case.spacing[:2]),
        orientation="" if case.affine is None else orientation(case.affine)[:2],
    )


def _labels(found: Measured) -> list[str]:
    scores = [score for line in found.lines.values() for score in line.scores]
    return list(dict.fromkeys(score.label for score in scores))


def _last_bases(lines: Sequence[BaseLine]) -> list[BaseLine]:
    return list({line.fold: line for line in lines if math.isfinite(line.seconds)}.values())
