"""Rules that bear bad sites: they choose or weigh updates, and a strategy combines them then.

All look at what updates *do*: the products of low-rank pairs and the whole arrays, side by
side. Distances and norms come from the K x K inner products of the updates, which need only
the stacked factors, so that no product is ever formed. What they bear and what not stands in
``core/strategy_table.py`` and is tested in ``tests/strategies/test_bad_updates.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dafne_federated.core.errors import StateError
from dafne_federated.core.low_rank import Wide, product_gram
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.strategy_table import least_sites
from dafne_federated.strategies.aggregation import Arrays, Update, capped, in_order
from dafne_federated.strategies.clipping import clipped
from dafne_federated.strategies.coordinate_wise import median, trimmed_mean

# Given are the plan, the updates, how many bad ones to bear, and what the sites were sent.
RobustRule = Callable[[AdaptationPlan, Sequence[Update], int, Arrays], list[Update]]

# Weiszfeld's steps shrink the distance to the median by a factor; so many leave nothing to see.
_STEPS = 200
# No update counts more than if it were this share of the mean distance away from the median.
_CLOSEST = 1e-6


def keep_all(
    _plan: AdaptationPlan, updates: Sequence[Update], _bad: int, _sent: Arrays
) -> list[Update]:
    """Return the updates as they are, none heavier than all others together."""
    return capped(updates)


def krum(plan: AdaptationPlan, updates: Sequence[Update], bad: int, _sent: Arrays) -> list[Update]:
    """Return the one update whose nearest neighbours are nearest.

    Raises:
        StateError: Fewer than ``2 bad + 3`` updates.

    Source:
        https://arxiv.org/abs/1703.02757.
    """
    return _nearest(plan, updates, bad, 1, "krum")


def multi_krum(
    plan: AdaptationPlan, updates: Sequence[Update], bad: int, _sent: Arrays
) -> list[Update]:
    """Return all updates but the ``bad`` ones whose nearest neighbours are farthest.

    Raises:
        StateError: Fewer than ``2 bad + 3`` updates.

    Source:
        https://arxiv.org/abs/1703.02757, with as many chosen as there are good sites.
    """
    return capped(_nearest(plan, updates, bad, len(updates) - bad, "multi-krum"))


def geometric_median(
    plan: AdaptationPlan, updates: Sequence[Update], bad: int, _sent: Arrays
) -> list[Update]:
    """Return the updates with shares that make their mean their geometric median.

    The median is the point with the least sum of distances; each site counts once, whatever
    number of cases it claims. It is a mean of the updates with weights that fall with the
    distance, so the search is one for weights, and distances follow from weights and inner
    products. Fewer than half of the sites can move it only so far, whatever they send.

    Raises:
        StateError: Fewer than ``2 bad + 1`` updates.

    Source:
        Weiszfeld's steps as in RFA, https://arxiv.org/abs/1912.13445.
    """
    _require(updates, bad, "geometric-median")
    ordered, by_cases = in_order(updates)
    gram = update_gram(plan, ordered)
    weights = np.full(len(ordered), 1 / len(ordered))
    for _ in range(_STEPS):
        squares = gram.diagonal() - 2 * gram @ weights + weights @ gram @ weights
        distances = np.sqrt(np.maximum(squares, 0.0))
        if not distances.any():
            break
        pull = 1 / np.maximum(distances, _CLOSEST * distances.mean())
        weights = pull / pull.sum()
    return [
        replace(update, share=update.share * float(now / then))
        for update, now, then in zip(ordered, weights, by_cases, strict=True)
    ]


ROBUST_RULES: dict[str, RobustRule] = {
    "none": keep_all,
    "clipped": clipped,
    "krum": krum,
    "multi-krum": multi_krum,
    "geometric-median": geometric_median,
    "median": median,
    "trimmed-mean": trimmed_mean,
}


def update_gram(plan: AdaptationPlan, updates: Sequence[Update]) -> Wide:
    """Return the inner products of all updates with each other, (K, K) float64.

    Low-rank pairs count by their products; where ``b`` stays at the sites, ``a`` counts.
    """
    gram = np.zeros((len(updates), len(updates)))
    for target in plan.targets:
        names = [name for name in _names(target) if name in updates[0].state]
        given = [[update.state[name] for update in updates] for name in names]
        if len(given) == 2:
            gram += plan.scale**2 * product_gram(list(zip(*given, strict=True)))
        elif given:
            flat = np.stack([array.astype(np.float64).ravel() for array in given[0]])
            gram += flat @ flat.T
    return gram


def _nearest(
    plan: AdaptationPlan, updates: Sequence[Update], bad: int, chosen: int, rule: str
) -> list[Update]:
    _require(updates, bad, rule)
    ordered = sorted(updates, key=lambda update: update.site)
    gram = update_gram(plan, ordered)
    norms = gram.diagonal()
    squares = np.maximum(norms[:, None] + norms - 2 * gram, 0.0)
    np.fill_diagonal(squares, 0.0)  # first of each row below: an update is no neighbour of itself
    neighbours = np.sort(squares, axis=1)[:, 1 : len(ordered) - bad - 1]
    best = np.argsort(neighbours.sum(axis=1), kind="stable")[:chosen]
    return [ordered[index] for index in sorted(best)]


def _require(updates: Sequence[Update], bad: int, rule: str) -> None:
    if len(updates) < (least := least_sites(rule, bad)):
        borne = max((len(updates) - least_sites(rule, 0)) // 2, 0)
        msg = (
            f"robust {rule!r} needs {least} updates to bear {bad} bad sites, got {len(updates)}, "
            f"which bear {borne}; set bad-sites to {borne} or ask more sites"
        )
        raise StateError(msg)


def _names(target: Target) -> list[str]:
    """Return the arrays that say how a weight changes; of a pair, ``b`` last."""
    parts = ["a", "b"] if target.low_rank else [target.kind.partition("-")[0]]
    return [f"{target.key}/{part}" for part in parts]
