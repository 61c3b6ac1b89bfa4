"""States at other ranks: the best cut for a site of small rank, and what it was not given.

A site of rank 2 in a federation of rank 16 gets the two strongest directions of each layer and
trains those. The other fourteen are not lost and not weighed down: the server keeps them as the
*rest* and completes the site's update with them, so that in the mean the site says "as it was"
about directions that it never saw, and not "zero".
"""

from dataclasses import dataclass

import numpy as np

from dafne_federated.core.low_rank import directions, widen
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, random_factor, state_rank


@dataclass(frozen=True)
class Cut:
    """A state at a rank.

    Attributes:
        state: What a site gets.
        rest: Factors by name whose products are what it does not get; none where all is in
            ``state``.
    """

    state: State
    rest: State

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return not any(array.any() for array in self.rest.values())


@dataclass(frozen=True)
class Cuts:
    """What each site is sent.

    Attributes:
        ranks: The rank by site.
        by_rank: The state at each of these ranks.
    """

    ranks: dict[str, int]
    by_rank: dict[int, Cut]

    def of(self, site: str) -> Cut:
        """Return what a site is sent."""
        return self.by_rank[self.ranks[site]]

    @property
    def whole(self) -> bool:
        """Whether every site gets the whole state."""
        return all(cut.whole for cut in self.by_rank.values())


def at_rank(plan: AdaptationPlan, state: State, rank: int, seed: int) -> Cut:
    """Return ``state`` at ``rank``: the best cut, or the same with new directions.

    Directions in which both factors are zero would have no gradient and stay zero for ever, so
    they begin again as those of an initial state do: ``a`` random, ``b`` zero. That changes no
    product. A state of this rank without such directions is returned as it is, bit for bit.

    Args:
        plan: What is trained.
        state: A state of it.
        rank: The rank of the result.
        seed: Of new directions.
    """
    generator = np.random.default_rng(seed)
    cut, rest = dict(state), State()
    for key in (target.key for target in plan.targets if target.low_rank):
        a, b = state[f"{key}/a"], state[f"{key}/b"]
        now = a.shape[-1]
        if rank < now:
            found = directions([(a, b)], [1.0])
            rest[f"{key}/a"], rest[f"{key}/b"] = found.pair(rank, now)
            a, b = found.pair(0, rank)
        elif rank > now:
            a, b = widen((a, b), rank)
        empty = ~(a.reshape(-1, rank).any(axis=0) | b.reshape(rank, -1).any(axis=1))
        if empty.any():
            a = np.where(empty, random_factor(generator, a.shape), a)
        cut[f"{key}/a"], cut[f"{key}/b"] = a, b
    return Cut(cut, rest)


def completed(state: State, rest: State) -> State:
    """Return ``state`` with the directions of ``rest`` behind its own."""
    whole = dict(state)
    for name, array in rest.items():
        whole[name] = np.concatenate([state[name], array], axis=-1 if name.endswith("/a") else 0)
    return whole


def site_ranks(
    plan: AdaptationPlan, state: State, chosen: dict[str, int | None], grows: bool
) -> dict[str, int]:
    """Return the rank at which each site gets ``state``.

    Args:
        plan: What is trained.
        state: The server's state.
        chosen: The rank that each site chose, None where it takes what the run has.
        grows: Whether that is the rank of the state, instead of the plan's own.
    """
    usual = state_rank(plan, state) if grows else plan.rank
    return {site: rank or usual for site, rank in chosen.items()}
