"""Average one factor where the other is the same at all sites: then the mean is exact.

``mean(a b_k) = a mean(b_k)``: no cross terms, nothing to cut, and a plain sum of arrays.
"""

from collections.abc import Sequence

import numpy as np

from dafne_federated.core.errors import StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update, in_order, mean_arrays


def mean_beside_common(
    plan: AdaptationPlan, updates: Sequence[Update], common: Sequence[str], strategy: str
) -> Aggregate:
    """Return the mean of every array, after checking that a factor is common to all sites.

    Args:
        plan: The plan of all states.
        updates: At least one; names differ.
        common: The factors of which one must be the same, bit for bit.
        strategy: Whose rule this is, for the error.

    Raises:
        StateError: None of them is the same at all sites.
    """
    first, *others = in_order(updates)[0]
    left = set(common)
    for update in others:
        left = {part for part in left if _same(plan, first, update, part)}
        if not left:
            msg = (
                f"strategy {strategy!r} needs {' or '.join(common)} to be the same at all sites, "
                f"got different ones of {first.site!r} and {update.site!r}; "
                "take strategy 'product'"
            )
            raise StateError(msg)
    return Aggregate(mean_arrays(updates, first.state), 0.0)


def _same(plan: AdaptationPlan, one: Update, other: Update, part: str) -> bool:
    names = [f"{target.key}/{part}" for target in plan.targets if target.low_rank]
    return all(np.array_equal(one.state[name], other.state[name]) for name in names)
