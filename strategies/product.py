"""Average what the updates do: the mean of the products, cut back to the plan's rank."""

from collections.abc import Sequence

from dafne_federated.core.low_rank import Pair, mean_of_products
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update, combine


def product(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the best pairs of the plan's rank for the exact mean of products.

    Ranks of the sites may differ. The error of the aggregate is what the cut left out.

    Source:
        FlexLoRA, https://arxiv.org/abs/2402.11505.
    """
    return combine(plan, updates, _mean)


def _mean(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    if len(pairs) == 1 and pairs[0][0].shape[-1] == rank:
        return pairs[0]  # the mean of one is itself, bit for bit
    return mean_of_products(pairs, weights, rank)
