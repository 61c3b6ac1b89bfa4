"""Pictures of a benchmark: Dice against persons, epochs, seconds and megabytes.

An arm has the same colour, marker and dash in all of them; names stand beside, in the page.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dafne_federated.simulations.benchmark_records import FitLine, Point
from dafne_federated.simulations.benchmark_statistics import Interval
from dafne_federated.simulations.benchmark_table import Row
from dafne_federated.simulations.figures import COLOURS, STYLE, Picture, new_axes, picture

_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_DASHES: Final = ("-", "--", "-.", ":")
_WIDTH: Final = 330  # CSS pixels
_HEIGHT: Final = 260

Axis = str
_AXES: Final[Mapping[Axis, str]] = {
    "epoch": "passes over the training slices",
    "seconds": "seconds of the processor, all sites",
    "longest": "seconds of the processor, slowest site",
    "megabytes": "megabytes sent, all sites, both ways",
}


def arm_style(number: int) -> dict[str, Any]:
    """Return a style that no other of 77 arms shares, in colour or in grey."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[(number + number // len(COLOURS)) % len(_DASHES)],
    }


def dice_by_persons(
    rows: Sequence[Row], arms: Sequence[str], held_out: bool = False
) -> Picture | None:
    """Draw the Dice of each arm at each size with its interval; None if nothing was measured.

    Args:
        rows: The table.
        arms: All arms, in the order of their styles.
        held_out: Whether to draw persons of a centre that took no part.
    """
    sizes = list(dict.fromkeys(row.persons for row in rows))
    drawn: dict[str, list[tuple[int, Interval]]] = {}
    for row in rows:
        found = row.held_out if held_out else row.dice
        if found is not None:
            drawn.setdefault(row.arm, []).append((sizes.index(row.persons), found))
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(2 * _WIDTH, 300)
        spread = 0.5 / max(len(drawn), 1)
        for place, (arm, points) in enumerate(drawn.items()):
            shift = (place - (len(drawn) - 1) / 2) * spread
            means = [found.mean for _, found in points]
            below = [
                found.mean - (found.mean if found.low is None else found.low) for _, found in points
            ]
            above = [
                (found.mean if found.high is None else found.high) - found.mean
                for _, found in points
            ]
            axes.errorbar(
                [at + shift for at, _ in points],
                means,
                yerr=[np.maximum(below, 0), np.maximum(above, 0)],
                elinewidth=1.0,
                capsize=2.0,
                **arm_style(arms.index(arm)),
            )
        axes.set_xticks(range(len(sizes)), [str(size or "all") for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xlabel("persons who train at each site")
        axes.set_ylabel("Dice, 0 to 1 (mean and 95 % interval)")
        words = [
            f"{arm} " + ", ".join(f"{found.mean:.2f}" for _, found in points)
            for arm, points in drawn.items()
        ]
        return picture(figure, f"Dice by persons per site: {'; '.join(words)}")


def dice_against(
    axis: Axis, fits: Mapping[str, Sequence[FitLine]], arms: Sequence[str]
) -> Picture | None:
    """Draw the best validation Dice so far against what it took; None if there are no curves.

    Args:
        axis: ``epoch``, ``seconds``, ``longest`` or ``megabytes``.
        fits: By arm, one for each seed; the mean over seeds is drawn, as far as all of them went.
        arms: All arms, in the order of their styles.
    """
    curves = {arm: _mean_curve(axis, own) for arm, own in fits.items()}
    curves = {arm: curve for arm, curve in curves.items() if curve}
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(_WIDTH, _HEIGHT)
        for arm, curve in curves.items():
            style = arm_style(arms.index(arm))
            every = max(len(curve) // 6, 1)
            axes.plot(
                [at for at, _ in curve],
                [dice for _, dice in curve],
                drawstyle="steps-post",
                markevery=every,
                **style,
            )
        lowest = min(dice for curve in curves.values() for _, dice in curve)
        highest = max(dice for curve in curves.values() for _, dice in curve)
        axes.set_ylim(max(0.0, min(lowest, highest - 0.4)), min(1.0, highest + 0.05))
        if axis != "epoch":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(base=10, numticks=6))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(_AXES[axis])
        axes.set_ylabel("validation Dice, best so far")
        words = [f"{arm} {curve[-1][1]:.2f} at {curve[-1][0]:.3g}" for arm, curve in curves.items()]
        return picture(figure, f"Dice against {_AXES[axis]}: {'; '.join(words)}")


def best_so_far(curve: Sequence[Point]) -> list[float]:
    """Return the highest Dice until each point."""
    found, best = [], -math.inf
    for point in curve:
        best = max(best, -math.inf if point.dice is None else point.dice)
        found.append(best)
    return found


def _mean_curve(axis: Axis, fits: Sequence[FitLine]) -> list[tuple[float, float]]:
    """Return the mean over seeds: of what each point took, and of the best Dice until it."""
    known = [fit.curve for fit in fits if any(point.dice is not None for point in fit.curve)]
    if not known:
        return []
    # One that stopped early stays where it was: the others may still get better.
    longest = max(len(curve) for curve in known)
    points = []
    for number in range(longest):
        going = [curve for curve in known if number < len(curve)]
        dice = [best_so_far(curve)[min(number, len(curve) - 1)] for curve in known]
        took = [float(getattr(curve[number], axis)) for curve in going]
        points.append((math.fsum(took) / len(took), math.fsum(dice) / len(dice)))
    # What is drawn never goes back, though seeds that stop change the mean of the others.
    kept: list[tuple[float, float]] = []
    for at, dice_now in points:
        if at > 0 and math.isfinite(dice_now) and (not kept or at >= kept[-1][0]):
            kept.append((at, dice_now))
    return kept
