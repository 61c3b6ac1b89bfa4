"""Train and average ``b`` alone; ``a`` is random, the same everywhere, and stays."""

from collections.abc import Sequence

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update
from dafne_federated.strategies.common_factor import mean_beside_common


def frozen_a(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the common ``a`` and the mean of ``b``: the exact mean of products.

    Raises:
        StateError: The sites do not share ``a``.

    Source:
        FFA-LoRA, https://arxiv.org/abs/2403.12313.
    """
    return mean_beside_common(plan, updates, ("a",), "frozen-a")
