"""Weights of sites for each output channel, where some sites did not annotate its label.

The output layer is trained whole, so its last axis is the output channels: one column of the
kernel and one value of the bias belong to one label alone. A site that lacks the label moves
them only along with background; its weight there is zero, and the others share it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan

Columns = Mapping[str, tuple[int, ...]]
Weight = float | npt.NDArray[np.float64]


def check_missing(plan: AdaptationPlan, missing: Sequence[int]) -> tuple[int, ...]:
    """Return the channels that a site says to lack, checked.

    Raises:
        StateError: They are not some of the labels' channels in order, or they are all of them.
    """
    channels, labels = tuple(missing), len(plan.labels)
    known = all(1 <= channel <= labels for channel in channels)
    if not known or list(channels) != sorted(set(channels)) or len(channels) == labels:
        msg = f"missing labels: expected some of 1 to {labels} in order, got {list(channels)[:9]}"
        raise StateError(msg)
    return channels


def missing_columns(plan: AdaptationPlan, missing: Sequence[int]) -> Columns:
    """Return by state array the columns of the labels that a site lacks.

    Whole arrays of the output layer alone have such; what else changes with a label changes
    with all others, too, and is averaged over all sites.
    """
    if not missing:
        return {}
    trained = {target.key for target in plan.targets}
    return {f"{key}/delta": tuple(missing) for key in plan.output if key in trained}


def column_weights(
    weights: Sequence[float], missing: Sequence[Sequence[int]], channels: int
) -> list[Weight]:
    """Return the weight of each site, for all columns or for each of them.

    Args:
        weights: Of the sites, with sum 1.
        missing: Columns that each site lacks.
        channels: Number of columns.

    Returns:
        ``weights`` themselves where nothing is missing; else (channels,) float64 each. A column
        that all sites lack keeps ``weights``: it moved with the others everywhere. In a column
        that three sites or more annotated none of them has more than half.
    """
    if not any(missing):
        return list(weights)
    each = np.repeat(np.array(weights)[:, np.newaxis], channels, axis=1)
    for site, columns in enumerate(missing):
        each[site, list(columns)] = 0.0
    for channel in range(channels):
        total = math.fsum(each[:, channel])
        whole = all(channel not in columns for columns in missing)
        if not whole:  # one that nobody lacks keeps its weights, bit for bit
            each[:, channel] = _capped(each[:, channel] / total) if total > 0 else weights
    return list(each)


def _capped(column: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return weights of which none is above one half, where three sites or more have one.

    ``capped`` of the updates sees the weights of all sites together.
    """
    largest = int(column.argmax())
    others = math.fsum(column) - column[largest]
    if np.count_nonzero(column) < 3 or column[largest] <= others:
        return column
    column = column / (2 * others)
    column[largest] = 0.5
    return column
