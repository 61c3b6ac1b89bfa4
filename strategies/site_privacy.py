"""How much one site can change in a round: at most a fixed length, and as much as any other.

The noise that hides a site is added to what comes out of this; see ``server/site_noise.py``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dafne_federated.strategies.aggregation import Arrays, Update
from dafne_federated.strategies.clipping import towards_sent


def bounded(
    updates: Sequence[Update], sent: Arrays, names: Sequence[str], clip: float
) -> list[Update]:
    """Return the updates with equal weights and shares such that none changes more than ``clip``.

    What one site did in this round, all arrays that moved as one vector, counts at most with L2
    norm ``clip``, so that the mean of m updates is at most ``clip / m`` away from the one in
    which that site changed nothing. As in ``clipping.py`` an update counts a share of its weight
    and the rest goes to what was sent. Numbers of cases are claims and do not count; neither
    does which labels a site lacks, because with fewer sites in a column each would count for more.

    Args:
        updates: At least one; names differ. One at a time stands in memory.
        sent: What the sites were sent.
        names: The arrays that moved in this round.
        clip: The largest L2 norm of a change.

    Source:
        Flat clipping of DP-FedAvg, https://arxiv.org/abs/1710.06963.
    """
    norms = {update.site: moved_norm(update.state, sent, names) for update in updates}
    shares = {site: clip / norm for site, norm in norms.items() if norm > clip}
    alike = [replace(update, cases=1, share=1.0, missing={}) for update in updates]
    return towards_sent(alike, shares, sent)


def moved_norm(state: Arrays, sent: Arrays, names: Sequence[str]) -> float:
    """Return how far the named arrays moved, as one vector: its L2 norm, in float64."""
    changes = (state[name].astype(np.float64) - sent[name] for name in names)
    return math.sqrt(math.fsum(float(np.sum(np.square(change))) for change in changes))
