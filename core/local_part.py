"""Low-rank pairs of which the first directions are everybody's and the last ones a site's own.

With strategy ``global+local`` a kernel changes by ``scale * (a b)_global + scale * (a b)_local``.
Side by side these are one pair of the summed rank, so a site trains both as one; what travels
are the first directions, and the last ones stay at the site from round to round. They begin with
``b`` zero, and so change nothing. Whole arrays are everybody's.

Source:
    The global and local adapters of https://arxiv.org/abs/2601.11219 (SDFLoRA).
"""

import numpy as np

from dafne_federated.core.state import State, random_factor


def with_local(state: State, own: State | None, rank: int, seed: int) -> State:
    """Return ``state`` with a local part of ``rank`` directions behind.

    Args:
        state: What everybody has.
        own: A state whose last directions are the local part; None begins one.
        rank: Directions of the local part; 0 leaves the state as it is.
        seed: Of a new local part.
    """
    if not rank:
        return state
    generator, whole = np.random.default_rng(seed), dict(state)
    for name, array in state.items():
        axis = {"/a": -1, "/b": 0}.get(name[-2:])
        if axis is None:
            continue
        shape = list(array.shape)
        shape[axis] = rank
        if own:
            local = np.take(own[name], np.arange(-rank, 0), axis)
        elif axis:
            local = random_factor(generator, tuple(shape))
        else:
            local = np.zeros(shape, np.float32)
        whole[name] = np.concatenate([array, local], axis)
    return whole


def global_part(state: State, rank: int) -> State:
    """Return ``state`` without the ``rank`` directions of its local part."""
    if not rank:
        return state
    cut = {name: array[..., :-rank] for name, array in state.items() if name.endswith("/a")}
    cut |= {name: array[:-rank] for name, array in state.items() if name.endswith("/b")}
    return state | cut


def silenced(state: State, rank: int) -> State:
    """Return ``state`` with the local part doing nothing, at the same rank."""
    if not rank:
        return state
    quiet = {name: array.copy() for name, array in state.items() if name.endswith("/b")}
    for array in quiet.values():
        array[-rank:] = 0
    return state | quiet
