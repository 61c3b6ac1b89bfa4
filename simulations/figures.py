"""Pictures of a run for its report, each small enough for a phone and clear in grey print.

No picture holds a name that somebody typed: names stand beside it, in the page.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dafne_federated.core.run_folder import RoundLine
from dafne_federated.simulations.comparison import Comparison

# Source: Okabe and Ito, Color Universal Design, https://jfly.uni-koeln.de/color/ (without black)
COLOURS: Final = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442")
INK: Final = "#222222"
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: Final = ("-", "--", "-.", ":")
_ARMS: Final[dict[str, tuple[str, str]]] = {  # colour and hatch
    "base": ("#ffffff", ""),
    "local only": ("#9fd3f2", "////"),
    "federated": ("#0072B2", ""),
    "fine-tuned": ("#9fd3f2", "////"),
}
PIXELS_PER_INCH: Final = 96  # of CSS
_SHARPNESS: Final = 2.5  # pixels of the picture in one of CSS
WIDTH: Final = 242  # CSS pixels: four beside each other on a desk; a phone makes one larger
# Whoever runs this may have a style of their own; text with $ in it is no formula.
STYLE: Final[dict[str, Any]] = {
    **{k: v for k, v in matplotlib.rcParamsDefault.items() if k not in ("backend", "timezone")},
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "lines.markeredgecolor": INK,
    "lines.markeredgewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A PNG that a page can hold.

    Attributes:
        uri: ``data:`` URI with all of it.
        alt: What it shows, in words.
        width: In CSS pixels.
        height: In CSS pixels.
    """

    uri: str
    alt: str
    width: int
    height: int


def dice_by_round(
    rounds: Sequence[RoundLine], site: str, labels: Sequence[str], chosen: int | None
) -> Picture | None:
    """Draw one site's validation Dice per label over rounds, or None if it measured none.

    Args:
        rounds: Line k holds the Dice of the state after round k - 1.
        site: The site.
        labels: Which labels, in the order of their styles.
        chosen: After which round the state was released; None if none was.
    """
    own = [line.sites[site].dice if site in line.sites else {} for line in rounds]
    curves: dict[int, list[float]] = {}
    for number, label in enumerate(labels):
        values = [math.nan if (dice := d.get(label)) is None else dice for d in own]
        if not all(map(math.isnan, values)):
            curves[number] = values
    if not curves:
        return None
    after = [line.round - 1 for line in rounds]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(WIDTH, 205)
        for number, values in curves.items():
            axes.plot(after, values, **_line_style(number))
        if chosen in after:  # a mark outside would leave the axes no room
            axes.axvline(chosen, color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(
                "released",
                (chosen, 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3 if chosen > after[-1] / 2 else 3, 4),
                textcoords="offset points",
                ha="right" if chosen > after[-1] / 2 else "left",
                fontsize=8.5,
            )
        axes.set_ylim(*dice_limits(rounds))
        axes.set_xlim(after[0] - 0.3, after[-1] + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("after round (0 = base)")
        axes.set_ylabel("Dice, 0 to 1")
        words = [f"{labels[number]} {_first_and_last(values)}" for number, values in curves.items()]
        return picture(figure, f"Dice of {site} over rounds: {'; '.join(words)}")


def dice_limits(rounds: Sequence[RoundLine]) -> tuple[float, float]:
    """Return the range of the Dice axis, the same for every site of a run."""
    values = [v for line in rounds for s in line.sites.values() for v in s.dice.values()]
    lowest = min((value for value in values if value is not None), default=0.0)
    return max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1.02


def dice_by_arm(comparison: Comparison, site: str) -> Picture:
    """Draw the mean Dice of one site's test persons by arm, with a dot for each person."""
    line = comparison.site_lines[site]
    persons = [means for (own, _), means in sorted(comparison.persons.items()) if own == site]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(WIDTH, 215)
        drawn = [arm for arm in comparison.arms if line.dice(arm) is not None]
        for place, arm in enumerate(drawn):
            colour, hatch = _ARMS[arm]
            value = line.dice(arm) or 0.0
            axes.bar(place, value, 0.62, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.9)
            axes.annotate(
                f"{value:.2f}",
                (place, 1.0),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
            )
        for means in persons:
            axes.plot(
                range(len(drawn)),
                [means.get(arm, math.nan) for arm in drawn],
                color="#666666",
                linewidth=0.7,
                marker="o",
                markersize=4.5,
                markerfacecolor="white",
                markeredgecolor=INK,
                markeredgewidth=0.9,
            )
        axes.set_ylim(0, 1.1)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.set_xlim(-0.6, len(drawn) - 0.4)
        axes.set_xticks(range(len(drawn)), [arm.replace(" ", "\n") for arm in drawn])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("mean Dice, 0 to 1")
        words = [f"{arm} {line.dice(arm):.2f}" for arm in drawn]
        return picture(figure, f"Mean Dice of {line.persons} persons of {site}: {', '.join(words)}")


def line_swatch(style: Mapping[str, Any] | int) -> Picture:
    """Return a line with its marker for a legend: of a style, or of a label (0 first)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(34 / PIXELS_PER_INCH, 14 / PIXELS_PER_INCH))
        kind = _line_style(style) if isinstance(style, int) else style
        figure.add_artist(
            Line2D([0.02, 0.5, 0.98], [0.5] * 3, markevery=[1], **{**kind, "clip_on": False})
        )
        return picture(figure, "")


def area_swatch(colour: str, hatch: str = "") -> Picture:
    """Return a filled area for a legend."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(22 / PIXELS_PER_INCH, 14 / PIXELS_PER_INCH))
        box = Rectangle((0.03, 0.05), 0.94, 0.9, facecolor=colour, hatch=hatch, edgecolor=INK)
        figure.add_artist(box)
        return picture(figure, "")


def new_axes(width: int, height: int) -> tuple[Any, Any]:
    """Return a figure of so many CSS pixels with empty axes."""
    size = width / PIXELS_PER_INCH, height / PIXELS_PER_INCH
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def picture(figure: Any, alt: str) -> Picture:
    """Return a figure as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    dots = PIXELS_PER_INCH * _SHARPNESS
    figure.savefig(buffer, format="png", dpi=dots, metadata={"Software": None})
    width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.get_size_inches())
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/png;base64,{data}", alt, width, height)


def _line_style(number: int) -> dict[str, Any]:
    """Return a style that no other of 28 labels shares, in colour or in grey."""
    kinds = len(COLOURS)
    return {
        "color": COLOURS[number % kinds],
        "marker": _MARKERS[number % kinds],
        "linestyle": _DASHES[(number + number // kinds) % len(_DASHES)],
    }


def _first_and_last(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"from {known[0]:.2f} to {known[-1]:.2f}"
