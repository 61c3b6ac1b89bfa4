"""The state of an adaptation: its arrays, their checks, and folding them into base weights.

Everything here is numpy: it needs neither TensorFlow nor the model's code.
"""

import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import StateError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.low_rank import dense_product
from dafne_federated.core.model_file import Weights
from dafne_federated.core.plan import AdaptationPlan, Target

State = dict[str, npt.NDArray[np.float32]]
Value = TypeVar("Value")


def initial_state(plan: AdaptationPlan, seed: int, rank: int | None = None) -> State:
    """Return a state that changes nothing: ``a`` random, all the rest zero.

    Args:
        plan: What is trained.
        seed: Seed of the random factors; the same seed gives the same bits.
        rank: Rank of the pairs, by default the plan's own.

    Source:
        Hu et al. 2021, https://arxiv.org/abs/2106.09685: one factor random (here He-uniform
        over the inputs of the layer), the other zero.
    """
    generator = np.random.default_rng(seed)
    state: State = {}
    for key, shape in plan.state_shapes(rank).items():
        state[key] = np.zeros(shape, np.float32)
        if key.endswith("/a"):
            state[key] = random_factor(generator, shape)
    return state


def random_factor(
    generator: np.random.Generator, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Return a factor ``a`` that a pair begins with, He-uniform over the inputs of the layer."""
    bound = np.sqrt(6.0 / np.prod(shape[:-1]))
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def check_state(
    plan: AdaptationPlan,
    state: Mapping[str, npt.NDArray[np.generic]],
    absent: Collection[str] = (),
) -> None:
    """Check that ``state`` is a complete, finite state of ``plan`` at one rank within bounds.

    Args:
        plan: What is trained.
        state: The arrays.
        absent: Factors, ``a`` or ``b``, that must not be there.

    Raises:
        StateError: A name is missing or unknown, or a shape, dtype or value is wrong.
    """
    rank = state_rank(plan, state)
    if rank > plan.max_rank:
        msg = f"rank: expected at most {plan.max_rank}, got {rank}"
        raise StateError(msg)
    shapes = without_factors(plan.state_shapes(rank), absent)
    if shapes.keys() != state.keys():
        missing, unknown = (
            sorted(shapes.keys() - state.keys()),
            sorted(state.keys() - shapes.keys()),
        )
        msg = f"arrays differ from the plan: missing {missing[:5]}, unknown {unknown[:5]}"
        raise StateError(msg)
    for key, shape in shapes.items():
        array = state[key]
        if array.shape != shape or array.dtype != np.float32:
            got = f"{array.shape} {array.dtype}"
            msg = f"array {key!r}: expected {shape} float32, got {got}"
            raise StateError(msg)
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            msg = f"array {key!r}: expected finite values, got {bad} that are not"
            raise StateError(msg)


def state_rank(plan: AdaptationPlan, state: Mapping[str, npt.NDArray[np.generic]]) -> int:
    """Return the rank of the pairs in ``state``; the plan's own where there are none."""
    for target in plan.targets:
        for part, axis in (("a", -1), ("b", 0)):
            factor = state.get(f"{target.key}/{part}")
            if target.low_rank and factor is not None and factor.ndim > 0:
                return max(int(factor.shape[axis]), 1)
    return plan.rank


def without_factors(arrays: Mapping[str, Value], factors: Collection[str]) -> dict[str, Value]:
    """Return ``arrays`` without those of the named factors, ``a`` or ``b``."""
    ends = tuple(f"/{factor}" for factor in factors)
    return {name: value for name, value in arrays.items() if not name.endswith(ends)}


def moving_arrays(
    plan: AdaptationPlan, state: Mapping[str, npt.NDArray[np.generic]], held: Collection[str]
) -> list[str]:
    """Return in order the names of the arrays that a round moves, which is all that is trained.

    Args:
        plan: What is trained.
        state: A state, for its rank.
        held: Factors, ``a`` or ``b``, that stand still in this round.
    """
    return sorted(without_factors(plan.state_shapes(state_rank(plan, state), trained=True), held))


def kernel_update(target: Target, a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return ``a @ b`` in the shape of the target's kernel, float64, without the scale."""
    return np.pad(_covered_update(target, a, b), target.padding())


def _covered_update(target: Target, a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float64]:
    product = dense_product((np.asarray(a, np.float32), np.asarray(b, np.float32)))
    if target.kind == "conv-transpose":
        *window, cout, cin = target.covered
        return np.moveaxis(product.reshape(cin, *window, cout), 0, -1)
    return product.reshape(target.covered)


def fold(weights: Weights, plan: AdaptationPlan, state: State) -> Weights:
    """Return the weights of the plain model that computes what the adapted one does.

    Args:
        weights: Base weights by weight key; not changed.
        plan: The plan that ``state`` belongs to.
        state: A checked state.

    Returns:
        All weights by key, with the dtypes and shapes of the base.

    Raises:
        StateError: The state does not fit the plan, or the plan does not fit the weights.
    """
    check_state(plan, state)
    folded = dict(weights)
    for target in plan.targets:
        base = weights.get(target.key)
        if base is None or base.shape != target.shape:
            got = "nothing" if base is None else str(base.shape)
            msg = (
                f"weight {target.key!r}: the plan expects shape {target.shape}, the base has {got}"
            )
            raise StateError(msg)
        padding = zip(target.shape, target.padding(), strict=True)
        part: tuple[Any, ...] = (
            ...,
            *(slice(before, size - behind) for size, (before, behind) in padding),
        )
        change = _change(plan, target, state, base)
        result = base.copy()
        # Summed in float64 and rounded once, without a float64 copy of base or result.
        np.add(base[part], change, out=result[part], dtype=np.float64, casting="unsafe")
        if target.kind == "variance" and (result.astype(np.float64) < 0).any():
            msg = f"weight {target.key!r}: expected variances of at least 0 after the change"
            raise StateError(msg)
        folded[target.key] = result
    return folded


def _change(
    plan: AdaptationPlan, target: Target, state: State, base: npt.NDArray[np.generic]
) -> npt.NDArray[np.float64]:
    """Return what a state adds to the covered part of the base weight of one target."""
    if target.low_rank:
        update = _covered_update(target, state[f"{target.key}/a"], state[f"{target.key}/b"])
        update *= plan.scale
        return update
    if target.kind == "delta" or not target.trained:
        return state[f"{target.key}/delta"].astype(np.float64)
    return base.astype(np.float64) * state[f"{target.key}/scale"].astype(np.float64)


def save_state(path: Path, plan: AdaptationPlan, state: State) -> None:
    """Write ``state`` together with its plan to ``path`` (an ``.npz`` without pickle)."""
    write_atomic(path, state_bytes(plan, state))


def state_bytes(plan: AdaptationPlan, state: State) -> bytes:
    """Return what ``save_state`` writes; equal states give equal bytes."""
    check_state(plan, state)
    text = np.frombuffer(plan.to_json().encode(), np.uint8)
    return npz_bytes({"plan": text, **dict(sorted(state.items()))})


def npz_bytes(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """Return arrays as an uncompressed ``.npz`` without pickle or times, in their order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()


def load_state(path: Path) -> tuple[AdaptationPlan, State]:
    """Read a state and its plan.

    Raises:
        StateError: The file cannot be read or does not hold a state of its plan.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        plan = AdaptationPlan.from_json(arrays.pop("plan").tobytes().decode())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        msg = f"{path.name}: not a state file of an adaptation: {error}"
        raise StateError(msg) from None
    check_state(plan, arrays)
    return plan, arrays
