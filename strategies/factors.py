"""Average the factors: the usual way, and not the mean of what the updates do."""

from collections.abc import Sequence

from dafne_federated.core.errors import StateError
from dafne_federated.core.low_rank import Pair
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update, combine, weighted_mean


def factors(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the separate means of ``a`` and of ``b``, the named baseline.

    ``mean(a) mean(b)`` holds cross terms ``a_1 b_2`` that no site asked for; the error of the
    aggregate says how much.

    Raises:
        StateError: The ranks of the sites differ.

    Source:
        FedIT, https://arxiv.org/abs/2305.05644.
    """
    return combine(plan, updates, _separate_means)


def _separate_means(pairs: Sequence[Pair], weights: Sequence[float], _rank: int) -> Pair:
    ranks = {a.shape[-1] for a, _ in pairs}
    if len(ranks) > 1:
        msg = f"strategy 'factors' needs one rank, got {sorted(ranks)}; take strategy 'product'"
        raise StateError(msg)
    a = weighted_mean([a for a, _ in pairs], weights)
    b = weighted_mean([b for _, b in pairs], weights)
    return a, b
