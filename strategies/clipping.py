"""No update changes more in a round than the median one: a robust rule."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dafne_federated.core.low_rank import distance_to_sum
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Arrays, Update, capped

# The name of what was sent, among the updates; no site can have it.
SENT = ""


def clipped(
    plan: AdaptationPlan, updates: Sequence[Update], _bad: int, sent: Arrays
) -> list[Update]:
    """Return the updates with shares such that none changes more than the median one.

    A change is what the site did in this round: its update minus what it was sent, for low-rank
    pairs in their product. With ``c`` the bound by the size of a change, ``sent + c (update -
    sent)`` is what is averaged; the mean of these is a weighted mean of the updates and of what
    was sent, so the rule needs no arrays of its own: an update counts ``c`` of its weight, and
    the rest of the weight goes to what was sent, as one update more (in a column of the output
    layer only if the site annotated its label). A strategy that cuts to a
    rank then cuts once, and one that keeps a factor finds the same one in what was sent. With
    strategy ``factors``, which does not average products, the bound holds to first order.

    Of an even number the lower middle one is the bound: the mean of two would let the larger
    set it.

    Args:
        plan: The plan of all states.
        updates: At least one; names differ. One at a time stands in memory.
        sent: What the sites were sent, before it was cut to the rank of each.

    Source:
        Clipping of updates as in https://arxiv.org/abs/1911.07963, with the median norm of the
        round as the bound.
    """
    norms = {update.site: change_norm(plan, update.state, sent) for update in updates}
    bound = statistics.median_low(norms.values())
    shares = {site: bound / norm for site, norm in norms.items() if norm > bound}
    return towards_sent(capped(updates), shares, sent)


def towards_sent(
    updates: Sequence[Update], shares: Mapping[str, float], sent: Arrays
) -> list[Update]:
    """Return the updates with less of their weight, and what was sent with the rest of it.

    Args:
        updates: Names differ.
        shares: What each site keeps of its weight, below 1; sites without one keep all.
        sent: What the sites were sent; in a column of the output layer it gets the weight only
            of those that annotated its label.
    """
    kept: list[Update] = []
    left: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = {}  # by what the sites lack
    for update in sorted(updates, key=lambda update: update.site):
        share = update.share
        if update.site in shares:
            share *= shares[update.site]
            lacks = tuple(sorted(update.missing.items()))
            left[lacks] = left.get(lacks, 0.0) + update.cases * (update.share - share)
        kept.append(replace(update, share=share))
    return kept + [Update(SENT, sent, 1, weight, dict(lacks)) for lacks, weight in left.items()]


def change_norm(plan: AdaptationPlan, state: Arrays, sent: Arrays) -> float:
    """Return how far ``state`` is from ``sent``: the Frobenius norm over all changed weights.

    Low-rank pairs count by their products, of whatever ranks; where ``b`` stays at the site,
    ``a`` counts by itself. Stored statistics do not change and do not count.
    """
    square = 0.0
    for target in plan.targets:
        a, b = f"{target.key}/a", f"{target.key}/b"
        if b in state:
            pairs = [(state[a], state[b])], (sent[a], sent[b])
            square += (plan.scale * distance_to_sum(pairs[1], pairs[0], [1.0])) ** 2
            continue
        for name in target.arrays(plan.rank) if target.trained else ():
            if (key := f"{target.key}/{name}") in state:
                change = state[key].astype(np.float64) - sent[key]
                square += float(np.sum(np.square(change)))
    return float(np.sqrt(square))
