"""Robust rules that take each value by itself, over all sites: median and trimmed mean.

They make sense only where a value means the same at all sites: where the change of a round is a
plain sum of arrays, with whole arrays or with one factor that all have in common. Sites count
alike, whatever their cases. What comes out is one update, which a strategy then leaves as it is.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.stats import trim_mean

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State
from dafne_federated.strategies.aggregation import Arrays, Update
from dafne_federated.strategies.clipping import SENT

Values = npt.NDArray[np.float64]


def median(
    _plan: AdaptationPlan, updates: Sequence[Update], _bad: int, _sent: Arrays
) -> list[Update]:
    """Return the median of each value as the only update.

    Source:
        https://arxiv.org/abs/1803.01498; the same as Flower's ``FedMedian``.
    """
    return [Update(SENT, _by_value(partial(np.median, axis=0), updates), 1)]


def trimmed_mean(
    _plan: AdaptationPlan, updates: Sequence[Update], bad: int, _sent: Arrays
) -> list[Update]:
    """Return the mean of each value without its ``bad`` largest and ``bad`` smallest ones.

    Where too few sites annotated a label to leave so many out, its column is their median.

    Source:
        https://arxiv.org/abs/1803.01498; the same as Flower's ``FedTrimmedAvg``.
    """

    def trimmed(values: Values) -> Values:
        if len(values) <= 2 * bad:
            return np.asarray(np.median(values, axis=0))
        # int(share * n) are cut at each end; a quarter keeps rounding from making that one less.
        return np.asarray(trim_mean(values, (bad + 0.25) / len(values), axis=0))

    return [Update(SENT, _by_value(trimmed, updates), 1)]


def _by_value(combine: Callable[[Values], Values], updates: Sequence[Update]) -> State:
    """Return what ``combine`` makes of each array; one array of all sites stands in memory."""
    ordered = sorted(updates, key=lambda update: update.site)
    state: State = {}
    for name in ordered[0].state:
        values = np.stack([update.state[name].astype(np.float64) for update in ordered])
        state[name] = _combined(combine, values)
        lacks = [update.missing.get(name, ()) for update in ordered]
        for column in sorted({column for columns in lacks for column in columns}):
            # The label of this column: those who annotated it, if anybody did.
            having = [column not in columns for columns in lacks]
            if any(having):
                state[name][..., column] = _combined(combine, values[having][..., column])
    return state


def _combined(combine: Callable[[Values], Values], values: Values) -> npt.NDArray[np.float32]:
    still = (values == values[0]).all()  # what stood still keeps its bits
    return np.asarray(values[0] if still else combine(values)).astype(np.float32)
