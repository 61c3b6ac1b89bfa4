"""Updates that are far larger than those of the other sites."""

import statistics
from collections.abc import Mapping

import numpy as np

from dafne_federated.core.low_rank import product_norm
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Arrays


def update_norm(plan: AdaptationPlan, state: Arrays) -> float:
    """Return how far ``state`` moves the base: the Frobenius norm over all changed weights.

    Low-rank pairs count by their product, which is what they do; two factorisations of the
    same update have the same norm. Where ``b`` stays at the site, ``a`` counts by itself.
    Stored statistics are not an update and do not count.
    """
    square = 0.0
    trained = plan.state_shapes(trained=True)
    for key, array in state.items():
        if key not in trained:
            continue
        name, _, part = key.partition("/")
        if part == "a" and f"{name}/b" in state:
            square += (plan.scale * product_norm((array, state[f"{name}/b"]))) ** 2
        elif part != "b":
            square += float(np.sum(np.square(array, dtype=np.float64)))
    return float(np.sqrt(square))


def too_large(norms: Mapping[str, float], ratio: float) -> dict[str, str]:
    """Return the reason by site for updates beyond ``ratio`` times the median of all.

    With fewer than three sites there is no majority to compare with, and nothing is refused.
    """
    if len(norms) < 3:
        return {}
    return _beyond(norms, dict.fromkeys(norms, statistics.median(norms.values())), ratio, "")


def grown_too_fast(
    norms: Mapping[str, float], before: Mapping[str, float], ratio: float
) -> dict[str, str]:
    """Return the reason by site for updates beyond ``ratio`` times what was known of the site.

    Args:
        norms: Of this round's updates.
        before: The largest norm so far of the site's own updates and of what it was sent; 0
            where there is nothing to compare with, and then nothing is refused.
        ratio: How much larger an update may be.
    """
    return _beyond(norms, before, ratio, " after its earlier ones")


def _beyond(
    norms: Mapping[str, float], known: Mapping[str, float], ratio: float, after: str
) -> dict[str, str]:
    return {
        site: f"its update is too large{after}: expected a norm of at most {limit:.3g}, "
        f"got {norm:.3g}"
        for site, norm in norms.items()
        for limit in (ratio * known.get(site, 0.0),)
        if norm > limit > 0
    }
