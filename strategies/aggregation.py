"""What every strategy shares: its input, its result, and the means it is built from."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dafne_federated.core.low_rank import Pair, widen
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State
from dafne_federated.strategies.column_weights import Columns, column_weights

Arrays = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Update:
    """One accepted update.

    Attributes:
        site: Registered name of the site.
        state: Its state after local training, checked; in memory, or read from disk where it
            is asked for. Factors that stay at the site are not in it.
        cases: Training cases, the site's weight.
        share: How much of that weight a robust rule or the cap leaves.
        missing: By state array the columns of labels that the site lacks: without weight.
    """

    site: str
    state: Arrays
    cases: int
    share: float = 1.0
    missing: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """The combined state of a round.

    Attributes:
        state: One state of the plan, at one rank.
        error: How far the low-rank part is from the exact mean of products, as a share of
            that mean's size: ``||mean(a_k b_k) - a b|| / ||mean(a_k b_k)||`` over all layers.
            Float32 rounding, some 1e-7, is left out where nothing else is missed.
    """

    state: State
    error: float


@dataclass(frozen=True)
class Combined:
    """The pairs of one layer, combined.

    Attributes:
        pair: The result, at any rank.
        missed: Norm of what it lacks of the weighted sum of the products.
        size: Norm of that sum.
    """

    pair: Pair
    missed: float
    size: float


Strategy = Callable[[AdaptationPlan, Sequence[Update]], Aggregate]
CombinePairs = Callable[[Sequence[Pair], Sequence[float], int], Combined]


def combine(
    plan: AdaptationPlan, updates: Sequence[Update], combine_pairs: CombinePairs
) -> Aggregate:
    """Average whole arrays and combine low-rank pairs layer by layer.

    Sites are taken in the order of their names and all sums run in float64, so the order of
    arrival cannot change a bit. The pairs of one layer stand in memory together, no more.
    Stored statistics are equal in all updates and so come out as they are.

    Args:
        plan: The plan of all states.
        updates: At least one; names differ.
        combine_pairs: Takes the pairs of one layer, their weights, and the rank of the plan.
    """
    ordered, weights = in_order(updates)
    state = mean_arrays(updates, (name for name in ordered[0].state if name[-2:] not in _FACTORS))
    keys = [target.key for target in plan.targets if target.low_rank]
    missed, size = 0.0, 0.0
    pairs: dict[str, Pair] = {}
    for key in keys:
        given = [(update.state[f"{key}/a"], update.state[f"{key}/b"]) for update in ordered]
        combined = combine_pairs(given, weights, plan.rank)
        pairs[key] = combined.pair
        missed += combined.missed**2
        size += combined.size**2
    common = max((a.shape[-1] for a, _ in pairs.values()), default=plan.rank)
    for key, pair in pairs.items():
        state[f"{key}/a"], state[f"{key}/b"] = widen(pair, common)
    return Aggregate(state, math.sqrt(missed / size) if size > 0 else 0.0)


def in_order(updates: Sequence[Update]) -> tuple[list[Update], list[float]]:
    """Return updates by the names of their sites, and their weights, with sum 1."""
    ordered = sorted(updates, key=lambda update: update.site)
    parts = [update.cases * update.share for update in ordered]
    total = math.fsum(parts)
    return ordered, [part / total for part in parts]


def capped(updates: Sequence[Update]) -> list[Update]:
    """Return the updates with shares such that no site outweighs all others together.

    Numbers of cases are claims. From three sites on, one that claims more than half of all
    counts as half: it can pull the mean, and not be the mean. One or two sites stay as they are.

    Source:
        Weights from sample counts, capped. One half is what no mean or median can bear of bad
        weight, https://arxiv.org/abs/1912.13445.
    """
    ordered, weights = in_order(updates)
    largest = max(range(len(ordered)), key=weights.__getitem__)
    others = math.fsum(weights[:largest] + weights[largest + 1 :])
    if len(ordered) < 3 or not 0 < others < weights[largest]:
        return list(updates)
    much = ordered[largest]
    less = replace(much, share=much.share * others / weights[largest])
    return [less if update is much else update for update in updates]


def mean_arrays(updates: Sequence[Update], names: Iterable[str]) -> State:
    """Return the weighted mean of the named arrays, site by site.

    One site's arrays and one set of sums stand in memory, however many sites there are. A
    column that belongs to one label is the mean of the sites that annotated it.
    """
    ordered, weights = in_order(updates)
    chosen = list(names)
    totals: dict[str, npt.NDArray[np.float64]] = {}
    named = {name for update in ordered for name in update.missing}
    by_column = {
        name: column_weights(
            weights, [u.missing.get(name, ()) for u in ordered], ordered[0].state[name].shape[-1]
        )
        for name in named.intersection(chosen)
    }
    for index, update in enumerate(ordered):
        for name in chosen:
            weight = by_column.get(name, weights)[index]
            part = weight * update.state[name].astype(np.float64)
            if name in totals:
                totals[name] += part
            else:
                totals[name] = part
    return {name: total.astype(np.float32) for name, total in totals.items()}


_FACTORS = ("/a", "/b")
