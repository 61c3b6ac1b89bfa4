"""Keep all that the updates do: the mean of the products, without a cut."""

from collections.abc import Sequence
from functools import partial

from dafne_federated.core.low_rank import Pair, directions, product_norm
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Combined, Update, combine


def stack(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return pairs that hold every direction of the mean of products.

    The stacked factors are compressed to the directions that they really have, which loses
    nothing: equal sites give their own rank, K different ones up to the sum of theirs. The
    base is never changed between rounds; sites get the state at the rank that it has and train
    all of it. So the rank may grow by the number of sites in every round, up to the plan's
    ``max_rank`` and no further: there the smallest directions are cut, and the error says how
    much that was. For a first round without a cut, set ``max-rank`` to the rank times the number
    of sites; no layer has more directions than its smaller side.

    Source:
        FLoRA, https://arxiv.org/abs/2409.05976, whose sites merge the stack into their base
        instead. Then every round changes the base, and its digest, cached features and
        rounding with it.
    """
    return combine(plan, updates, partial(_all, largest=plan.max_rank))


def _all(pairs: Sequence[Pair], weights: Sequence[float], _rank: int, *, largest: int) -> Combined:
    if len(pairs) == 1:
        return Combined(pairs[0], 0.0, product_norm(pairs[0]))
    found = directions(pairs, weights)
    rank = min(max(found.values.size, 1), largest)
    return Combined(found.pair(0, rank), found.norm(rank), found.norm())
