"""Average ``a`` alone; each site keeps a ``b`` of its own, which never leaves it."""

from collections.abc import Sequence

import numpy as np

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update, mean_arrays


def shared_a(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the mean of ``a`` and of whole arrays, with ``b`` zero.

    Nobody but the sites knows what their updates do, so there is no mean of products and no
    model for everybody: the state is what they share, each adds its own ``b``. A site's own
    state is complete in its cache (``client/site_cache.py``), and ``dafne-federated merge``
    makes its own model of it there.

    Source:
        FedSA-LoRA, https://arxiv.org/abs/2410.01463.
    """
    shared = [name for name in updates[0].state if not name.endswith("/b")]
    state = mean_arrays(updates, shared)
    for target in plan.targets:
        if target.low_rank:
            rank = state[f"{target.key}/a"].shape[-1]
            state[f"{target.key}/b"] = np.zeros(target.pair_shapes(rank)[1], np.float32)
    return Aggregate(state, 0.0)
