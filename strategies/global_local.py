"""Average what the global parts of the updates do; local parts stay at the sites."""

from collections.abc import Sequence

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.strategies.aggregation import Aggregate, Update
from dafne_federated.strategies.product import product


def global_local(plan: AdaptationPlan, updates: Sequence[Update]) -> Aggregate:
    """Return the mean of the products of the global parts, cut to the rank; see ``product``.

    A site trains its global and its local part together (``core/local_part.py``) and sends the
    global one. The model for everybody is the base with the global part, and that is what sites
    measure; a site's own is in its cache, and ``dafne-federated merge`` makes a model of it.

    Source:
        The global and local adapters of https://arxiv.org/abs/2601.11219 (SDFLoRA).
    """
    return product(plan, updates)
