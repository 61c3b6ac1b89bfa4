"""Train and average one factor at a time: ``b`` in odd rounds, ``a`` in even ones."""

from collections.abc import Sequence

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update
from dafne_federated.strategies.common_factor import mean_beside_common


def alternating(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the factor that stood still and the mean of the other: exact in every round.

    Raises:
        StateError: The sites share neither factor.

    Source:
        RoLoRA, https://arxiv.org/abs/2502.01755.
    """
    return mean_beside_common(plan, updates, ("a", "b"), "alternating")
