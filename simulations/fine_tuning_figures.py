"""Curves of a fine-tuning for its report: loss and validation Dice by epoch."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator

from dafne_federated.core.fine_tuning_folder import EpochLine
from dafne_federated.simulations.figures import COLOURS, INK, STYLE, Picture, new_axes, picture

_WIDTH, _HEIGHT = 330, 220  # CSS pixels


def loss_by_epoch(lines: Sequence[EpochLine]) -> Picture:
    """Draw the training loss by epoch, with the stages."""
    values = [line.loss for line in lines]
    alt = f"Training loss over {len(lines)} epochs, from {values[0]:.4g} to {values[-1]:.4g}"
    return _curve(lines, values, "training loss", alt)


def dice_by_epoch(
    lines: Sequence[EpochLine], base: float | None, taken: int | None
) -> Picture | None:
    """Draw the validation Dice by epoch, or None without any.

    Args:
        lines: The epochs.
        base: Dice of the base, drawn as a dotted line.
        taken: The epoch whose state was taken; None if none was.
    """
    values = [line.dice for line in lines if line.dice is not None]
    if not values or base is None:
        return None

    def more(axes: Any) -> None:
        axes.axhline(base, color=INK, linewidth=1.1, linestyle=(0, (1, 2)), label="base")
        if taken:
            axes.plot(
                [taken], [values[taken - 1]], marker="o", markersize=10, color="none",
                markeredgecolor=INK, markeredgewidth=1.4, linestyle="", label="taken",
            )  # fmt: skip
        axes.legend(loc="best")

    alt = f"Validation Dice over {len(lines)} epochs; base {base:.3f}, highest {max(values):.3f}"
    return _curve(lines, values, "validation Dice, 0 to 1", alt, more)


def _curve(
    lines: Sequence[EpochLine],
    values: Sequence[float],
    name: str,
    alt: str,
    more: Callable[[Any], None] | None = None,
) -> Picture:
    epochs = [line.epoch for line in lines]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(_WIDTH, _HEIGHT)
        axes.plot(epochs, values, color=COLOURS[1], marker="o", markersize=3.0)
        if more:
            more(axes)
        groups = [list(group) for _, group in itertools.groupby(lines, key=lambda x: x.stage)]
        for group in groups if len(groups) > 1 else ():
            if group[0].epoch > 1:
                axes.axvline(group[0].epoch - 0.5, color="#888888", linewidth=0.8)
            axes.annotate(
                group[0].stage, (group[0].epoch - 0.4, 1.0), xycoords=("data", "axes fraction"),
                xytext=(1, 1), textcoords="offset points", fontsize=8, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        return picture(figure, alt)
