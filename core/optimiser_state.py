"""What Adam knows after a round, kept as arrays and carried over to factors in another basis.

Between two rounds the server may return the factors of a low-rank pair in another basis: the
cut of strategy ``product`` turns, scales and mixes the directions that a site trained. Moments of
gradients belong to the basis that they were measured in, and have to follow.

Derivation. A pair is ``W = a b`` with ``a`` (m, r) and ``b`` (r, n); with the gradient ``G`` of
the loss for ``W``, those for the factors are ``G b'`` and ``a' G``. So the one for ``a`` depends
on the basis by ``b`` alone, and the other way round. If the new factor is made of the old one,
``a_new = a_old T``, then ``a_new' G = T' (a_old' G)`` for every ``G``: what was measured for
``b`` becomes ``T' m_b``, and with ``b_new = S b_old`` what was measured for ``a`` becomes
``m_a S'``. Where new factors are not made of the old ones alone, ``T`` and ``S`` are the least
squares solutions: of a new direction, the part that the old ones span is known, the rest
begins at zero. For a mere change of basis ``S`` is the inverse of ``T``, so the moments change
as gradients do, contrary to the factors.

The second moment, a mean of squares, cannot be carried over exactly: the square of a sum needs
the products of different directions, which Adam does not keep. Without them it becomes
``(T o T)' v_b``, entry by entry, which is exact for permutations and signs, exact in the mean for
gradients that do not correlate between directions, and never negative.

Source:
    Chain rule. Adam and its moments: https://arxiv.org/abs/1412.6980.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import StateError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.low_rank import Wide
from dafne_federated.core.state import State, npz_bytes


@dataclass(frozen=True)
class AdamState:
    """What Adam knows, by state key.

    Attributes:
        steps: Steps so far.
        first: Running means of the gradients of what is trained, float32.
        second: Running means of their squares.
        factors: The factors of all low-rank pairs after the last of these steps.
    """

    steps: int
    first: State
    second: State
    factors: State


def carried_over(kept: AdamState, state: State) -> AdamState:
    """Return what is known of the gradients in the basis of ``state``.

    Where a factor is the same, bit for bit, the moments of its partner are so, too.

    Args:
        kept: What was kept.
        state: The state from which training goes on.

    Raises:
        StateError: They do not belong to the same plan.
    """
    first, second = dict(kept.first), dict(kept.second)
    factors = {name: state[name] for name in kept.factors if name in state}
    try:
        for name in kept.first:
            key, _, part = name.rpartition("/")
            if part not in ("a", "b"):
                first[name].reshape(state[name].shape)  # a check
                continue
            partner = f"{key}/{'b' if part == 'a' else 'a'}"
            old, new = kept.factors[partner], state[partner]
            if np.array_equal(old, new):
                continue
            axis = -1 if part == "a" else 0
            turn = _turn(_columns(old, partner), _columns(new, partner))
            first[name] = _turned(kept.first[name], turn, axis)
            second[name] = _turned(kept.second[name], turn**2, axis)
    except (KeyError, ValueError, np.linalg.LinAlgError):
        msg = "optimiser: expected the moments of this plan, got others"
        raise StateError(msg) from None
    return AdamState(kept.steps, first, second, factors)


def save_optimiser(path: Path, kept: AdamState) -> None:
    """Write what Adam knows to ``path``, whole or not at all (an ``.npz`` without pickle)."""
    arrays: dict[str, npt.NDArray[np.generic]] = {"steps": np.array([kept.steps])}
    for part in _PARTS:
        arrays |= {f"{part}/{name}": a for name, a in sorted(getattr(kept, part).items())}
    write_atomic(path, npz_bytes(arrays))


def load_optimiser(path: Path) -> AdamState:
    """Read what ``save_optimiser`` wrote.

    Raises:
        StateError: The file cannot be read or does not hold moments.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        steps = int(arrays.pop("steps")[0])
    except (OSError, ValueError, LookupError, zipfile.BadZipFile, EOFError) as error:
        msg = f"{path.name}: not what an optimiser knew: {error}"
        raise StateError(msg) from None
    found: dict[str, State] = {part: {} for part in _PARTS}
    for name, array in arrays.items():
        part, _, key = name.partition("/")
        found.setdefault(part, {})[key] = array
    shapes = [{key: array.shape for key, array in found[part].items()} for part in _PARTS[:2]]
    usable = all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays.values())
    if shapes[0] != shapes[1] or len(found) > len(_PARTS) or not usable:
        msg = f"{path.name}: expected first and second moments of the same finite arrays"
        raise StateError(msg)
    return AdamState(steps, **found)


_PARTS = ("first", "second", "factors")


def _columns(factor: npt.NDArray[np.float32], name: str) -> Wide:
    """Return a factor as a float64 matrix whose columns are its directions."""
    wide = factor.astype(np.float64)
    if name.endswith("/a"):
        return wide.reshape(-1, factor.shape[-1])
    return wide.reshape(factor.shape[0], -1).T


def _turn(old: Wide, new: Wide) -> Wide:
    """Return the (old rank, new rank) matrix that makes ``new`` of ``old``, as far as it can."""
    digits = max(old.shape) * np.finfo(np.float32).eps  # what float32 factors say for sure
    return np.asarray(np.linalg.lstsq(old, new, rcond=digits)[0], np.float64)


def _turned(moment: npt.NDArray[np.float32], turn: Wide, axis: int) -> npt.NDArray[np.float32]:
    result = np.tensordot(moment.astype(np.float64), turn, axes=(axis, 0))
    return np.ascontiguousarray(np.moveaxis(result, -1, axis), np.float32)
