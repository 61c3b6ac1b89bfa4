"""Count, mean and variance of values by channel, and their exact pooling over sites.

All in numpy and float64: the server needs neither TensorFlow nor the model's code for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dafne_federated.core.plan import Target
from dafne_federated.core.state import State

Row = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """What is known of values that are not kept.

    Attributes:
        count: How many values there were for each channel, or a number in proportion to it.
        mean: (channels,) float64.
        variance: (channels,) float64, the mean squared distance from ``mean``.
    """

    count: int
    mean: Row
    variance: Row


def moments(values: npt.NDArray[np.floating]) -> Moments:
    """Return the moments of ``values`` (.., channels) over all axes but the last."""
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    return Moments(len(flat), flat.mean(axis=0), flat.var(axis=0))


def pool_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all values together, as if they had been seen at once.

    The variance is the mean of the variances plus the spread of the means around the pooled
    one; averaging variances alone would leave that spread out. The parts are summed in the
    order given, so a caller who sorts them gets the same bits whatever arrived first.

    Args:
        parts: At least one, each of at least one value.

    Source:
        Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", The
        American Statistician 37(3), for many groups: no difference of large squares is formed.
    """
    total = sum(part.count for part in parts)
    mean = _sum(part.count / total * part.mean for part in parts)
    spread = _sum(
        part.count / total * (part.variance + np.square(part.mean - mean)) for part in parts
    )
    return Moments(total, mean, spread)


def statistics_change(
    mean: Target, variance: Target, base: tuple[npt.NDArray[Any], npt.NDArray[Any]], pooled: Moments
) -> State:
    """Return the state arrays that bring a normalisation's statistics to the pooled ones.

    Folding adds them to the base in float64 and rounds once, so what comes out is right to a
    float32 of the larger of base and pooled value, and a variance never below 0.

    Args:
        mean: Target of the stored mean.
        variance: Target of the stored variance.
        base: Stored mean and variance of the base, (channels,) each.
        pooled: What they should be.
    """
    arrays: State = {}
    for target, before, after in zip(
        (mean, variance), base, (pooled.mean, pooled.variance), strict=True
    ):
        stored = np.asarray(before, np.float64)
        change = (after - stored).astype(np.float32)
        if target.kind == "variance":  # rounded away from 0 by one step at most
            low = stored + change.astype(np.float64) < 0
            change[low] = np.nextafter(change[low], np.float32(0))
        arrays[f"{target.key}/delta"] = change
    return arrays


def _sum(rows: Iterable[Row]) -> Row:
    first, *rest = rows
    total = first.copy()
    for row in rest:
        total += row
    return total
