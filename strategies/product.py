"""Average what the updates do: the mean of the products, cut back to a rank."""

from collections.abc import Sequence

from dafne_federated.core.low_rank import Pair, directions, product_norm
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Combined, Update, combine


def product(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the best pairs for the exact mean of products.

    Ranks of the sites may differ; the result has the plan's. The error of the aggregate is what
    the cut left out. A site of a larger rank gets the result itself with new directions beside
    it, trains all of them, and counts with its whole product; were the result as large as that,
    the choice of one site would leave all others a cut, and no state would be measured whole.

    Every update counts with its whole product and the weight of its cases, in every direction.
    A site of small rank does not pull down directions that it never saw, because its update is
    completed with them before it comes here (``core/rank_cut.py``). Averages that pad small
    updates with zeros do pull them down, round by round, until the smallest rank is left.

    Source:
        FlexLoRA, https://arxiv.org/abs/2402.11505; the collapse to the smallest rank is
        described in https://arxiv.org/abs/2602.13486, which weighs slices of the rank instead.
    """
    return combine(plan, updates, _mean)


def _mean(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Combined:
    if len(pairs) == 1 and pairs[0][0].shape[-1] == rank:
        return Combined(pairs[0], 0.0, product_norm(pairs[0]))  # itself, bit for bit
    found = directions(pairs, weights)
    return Combined(found.pair(0, rank), found.norm(rank), found.norm())
