"""Updates that are far larger than those of the other sites."""

import statistics
from collections.abc import Sequence

import numpy as np

from dafne_federated.core.low_rank import product_norm
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Arrays, Update


def update_norm(plan: AdaptationPlan, state: Arrays) -> float:
    """Return how far ``state`` moves the base: the Frobenius norm over all changed weights.

    Low-rank pairs count by their product, which is what they do; two factorisations of the
    same update have the same norm. Where ``b`` stays at the site, ``a`` counts by itself.
    """
    square = 0.0
    for key, array in state.items():
        name, _, part = key.partition("/")
        if part == "a" and f"{name}/b" in state:
            square += (plan.scale * product_norm((array, state[f"{name}/b"]))) ** 2
        elif part != "b":
            square += float(np.sum(np.square(array, dtype=np.float64)))
    return float(np.sqrt(square))


def too_large(plan: AdaptationPlan, updates: Sequence[Update], ratio: float) -> dict[str, str]:
    """Return the reason by site for updates beyond ``ratio`` times the median of all.

    With fewer than three sites there is no majority to compare with, and nothing is refused.
    """
    norms = {update.site: update_norm(plan, update.state) for update in updates}
    if len(norms) < 3:
        return {}
    limit = ratio * statistics.median(norms.values())
    return {
        site: f"its update is too large: expected a norm of at most {limit:.3g}, got {norm:.3g}"
        for site, norm in norms.items()
        if norm > limit > 0
    }
