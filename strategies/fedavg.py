"""Average whole arrays: exact where an update is nothing but arrays that add up."""

from collections.abc import Sequence

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update, mean_arrays


def fedavg(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the mean of every array, for plans without low-rank pairs.

    Raises:
        StateError: The plan has low-rank pairs.

    Source:
        McMahan et al. 2017, https://arxiv.org/abs/1602.05629.
    """
    pairs = [target.key for target in plan.targets if target.low_rank]
    if pairs:
        msg = (
            f"strategy 'fedavg' averages whole arrays, got low-rank pairs for {pairs[:3]}; "
            "take strategy 'product', or 'factors' for the mean of each factor"
        )
        raise StateError(msg)
    return Aggregate(mean_arrays(updates, updates[0].state), 0.0)
