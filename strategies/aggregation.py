"""What every strategy shares: its input, its result, and the means it is built from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dafne_federated.core.low_rank import Pair, distance_to_sum, product_norm
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State


@dataclass(frozen=True)
class Update:
    """One accepted update.

    Attributes:
        site: Registered name of the site.
        state: Its state after local training, checked.
        cases: Training cases, the site's weight.
    """

    site: str
    state: State
    cases: int


@dataclass(frozen=True)
class Aggregate:
    """The combined state of a round.

    Attributes:
        state: One state of the plan, at the plan's rank.
        error: How far the low-rank part is from the exact mean of products, as a share of
            that mean's size: ``||mean(a_k b_k) - a b|| / ||mean(a_k b_k)||`` over all layers.
    """

    state: State
    error: float


Strategy = Callable[[AdaptationPlan, Sequence[Update]], Aggregate]
CombinePairs = Callable[[Sequence[Pair], Sequence[float], int], Pair]


def combine(
    plan: AdaptationPlan, updates: Sequence[Update], combine_pairs: CombinePairs
) -> Aggregate:
    """Average dense parts and combine low-rank pairs layer by layer.

    Sites are taken in the order of their names and all sums run in float64, so the order of
    arrival cannot change a bit. Stored statistics are equal in all updates and are carried on.

    Args:
        plan: The plan of all states.
        updates: At least one; names differ.
        combine_pairs: Takes the pairs of one layer, the weights and the rank.
    """
    ordered = sorted(updates, key=lambda update: update.site)
    total = math.fsum(update.cases for update in ordered)
    weights = [update.cases / total for update in ordered]
    state: State = {}
    missed, size = 0.0, 0.0
    for target in plan.targets:
        key = target.key
        if not target.trained:  # the gate saw to it that they are equal
            state[f"{key}/delta"] = ordered[0].state[f"{key}/delta"]
            continue
        if not target.low_rank:
            for name in (f"{key}/{part}" for part in target.arrays(plan.rank)):
                state[name] = weighted_mean([u.state[name] for u in ordered], weights)
            continue
        pairs = [(u.state[f"{key}/a"], u.state[f"{key}/b"]) for u in ordered]
        a, b = combine_pairs(pairs, weights, plan.rank)
        state |= {f"{key}/a": a, f"{key}/b": b}
        missed += distance_to_sum((a, b), pairs, weights) ** 2
        size += _norm_of_sum(pairs, weights) ** 2
    return Aggregate(state, math.sqrt(missed / size) if size > 0 else 0.0)


def weighted_mean(
    arrays: Sequence[npt.NDArray[np.float32]], weights: Sequence[float]
) -> npt.NDArray[np.float32]:
    """Return the weighted sum of arrays of one shape, summed in float64, as float32."""
    total = np.zeros(arrays[0].shape, np.float64)
    for weight, array in zip(weights, arrays, strict=True):
        total += weight * array.astype(np.float64)
    return total.astype(np.float32)


def _norm_of_sum(pairs: Sequence[Pair], weights: Sequence[float]) -> float:
    if len(pairs) == 1:
        return weights[0] * product_norm(pairs[0])
    (a, b), *_ = pairs
    nothing = (np.zeros_like(a), np.zeros_like(b))
    return distance_to_sum(nothing, pairs, weights)
