"""How much a run sent and how long it took, by round, as charts for its report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dafne_federated.core.run_folder import RoundLine
from dafne_federated.simulations.figures import (
    COLOURS,
    INK,
    STYLE,
    WIDTH,
    Picture,
    area_swatch,
    line_swatch,
    new_axes,
    picture,
)

_DOWN: Final = {"color": COLOURS[1], "linestyle": "-", "marker": "o"}
_UP: Final = {"color": COLOURS[0], "linestyle": "--", "marker": "s"}
_WHOLE: Final = {"color": INK, "linestyle": ":", "marker": ""}
_TRAINING: Final = {"color": COLOURS[0], "linestyle": "--", "marker": "D"}
_ROUND: Final = "#dddddd"


@dataclass(frozen=True)
class Chart:
    """A chart, its title, and a picture of each line or area in it by what that means."""

    title: str
    picture: Picture
    legend: dict[str, Picture]


def traffic_charts(rounds: Sequence[RoundLine], base_bytes: int | None) -> list[Chart]:
    """Return charts of megabytes and of seconds by round.

    Args:
        rounds: At least one.
        base_bytes: Size of the whole model; None where unknown.
    """
    return [_megabytes(rounds, base_bytes), _seconds(rounds)]


def _megabytes(rounds: Sequence[RoundLine], base_bytes: int | None) -> Chart:
    numbers = [line.round for line in rounds]
    down = [sum(s.bytes_down for s in line.sites.values()) / 1e6 for line in rounds]
    up = [sum(s.bytes_up for s in line.sites.values()) / 1e6 for line in rounds]
    lines = [("to the sites", down, _DOWN), ("from the sites", up, _UP)]
    if base_bytes:
        whole = [len(line.sites) * base_bytes / 1e6 for line in rounds]
        lines.append(("whole model, one way", whole, _WHOLE))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(WIDTH, 205)
        for _, values, style in lines:
            shown = [value if value > 0 else math.nan for value in values]
            axes.plot(numbers, shown, **style)
        _positive_axis(axes, [v for _, values, _ in lines for v in values if v > 0])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("round (the last one evaluates)")
        axes.set_ylabel("MB, all sites together")
        alt = f"Megabytes by round: {sum(down):.2f} to the sites, {sum(up):.2f} from the sites"
        drawn = picture(figure, alt)
    return Chart("Megabytes by round", drawn, {word: line_swatch(s) for word, _, s in lines})


def _seconds(rounds: Sequence[RoundLine]) -> Chart:
    numbers = [line.round for line in rounds]
    wall = [line.seconds for line in rounds]
    slowest = [max((s.seconds for s in line.sites.values()), default=0.0) for line in rounds]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(WIDTH, 205)
        axes.bar(numbers, wall, 0.62, color=_ROUND, edgecolor=INK, linewidth=0.9)
        trained = [
            (n, s) for n, s, line in zip(numbers, slowest, rounds, strict=True) if line.trained
        ]
        axes.plot([n for n, _ in trained], [s for _, s in trained], **_TRAINING)
        axes.set_ylim(0, max([*wall, *slowest, 1e-3]) * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("round (the last one evaluates)")
        axes.set_ylabel("seconds")
        drawn = picture(figure, f"Seconds by round: {sum(wall):.0f} in all")
    legend = {
        "whole round": area_swatch(_ROUND),
        "training at the slowest site": line_swatch(_TRAINING),
    }
    return Chart("Seconds by round", drawn, legend)


def _positive_axis(axes: Any, values: Sequence[float]) -> None:
    """Use a logarithmic axis where the smallest value would vanish on a plain one."""
    if not values or max(values) < 20 * min(values):
        axes.set_ylim(0, max(values, default=1.0) * 1.1)
        return
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
