"""Average the factors: the usual way, and not the mean of what the updates do."""

from collections.abc import Sequence

import numpy as np

from dafne_federated.core.errors import StateError
from dafne_federated.core.low_rank import Pair, distance_to_sum, product_norm
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Combined, Update, combine


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


def _separate_means(pairs: Sequence[Pair], weights: Sequence[float], _rank: int) -> Combined:
    ranks = {a.shape[-1] for a, _ in pairs}
    if len(ranks) > 1:
        msg = f"strategy 'factors' needs one rank, got {sorted(ranks)}; take strategy 'product'"
        raise StateError(msg)
    if len(pairs) == 1:
        return Combined(pairs[0], 0.0, product_norm(pairs[0]))
    weighed = list(zip(weights, pairs, strict=True))
    a = sum(w * pair[0].astype(np.float64) for w, pair in weighed)
    b = sum(w * pair[1].astype(np.float64) for w, pair in weighed)
    mean = np.asarray(a, np.float32), np.asarray(b, np.float32)
    nothing = np.zeros_like(mean[0]), np.zeros_like(mean[1])
    missed, size = (distance_to_sum(pair, pairs, weights) for pair in (mean, nothing))
    return Combined(mean, missed, size)
