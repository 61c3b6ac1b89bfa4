"""A whole model that somebody retrained, as a state of a plan: what training of it would send."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import ModelFileError, StateError
from dafne_federated.core.low_rank import Pair, directions
from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import State, check_state, fold

Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Adopted:
    """A state, and how much of the change it keeps.

    A share is ``1 - |change - kept|^2 / |change|^2`` over the values of a weight, after folding;
    1 where nothing changed.

    Attributes:
        state: The state; ``fold`` of it into the base comes as near to the model as its rank can.
        share: Over the weights that the plan trains, all together.
        whole: Over all weights of the model. Stored variances of normalisations are large numbers:
            where they moved, they are nearly all of it.
        shares: By weight key of the plan.
        left_out: Norm of the change of each weight that the plan does not change, where there is
            one: stored statistics of normalisations, for example.
    """

    state: State = field(repr=False)
    share: float
    whole: float
    shares: dict[str, float]
    left_out: dict[str, float]


def adopt(
    base: ModelFile, model: ModelFile, plan: AdaptationPlan, rank: int | None = None
) -> Adopted:
    """Return the state of ``plan`` that comes nearest to a model retrained from ``base``.

    A low-rank pair is the best one of its rank, by the theorem of Eckart and Young; a scale is
    the least-squares one of its output channel; all else is kept exactly. Nothing is executed.

    Args:
        base: The version that was retrained; the one of the plan.
        model: What became of it.
        plan: What may change.
        rank: Rank of the pairs, by default the plan's own.

    Raises:
        ModelFileError: ``model`` is no retrained ``base``.
        StateError: The plan is of another base, or the rank is out of its bounds.
    """
    _check(base, model, plan)
    rank = plan.rank if rank is None else rank
    if not 1 <= rank <= plan.max_rank:
        msg = f"rank: expected 1 to {plan.max_rank}, got {rank}"
        raise StateError(msg)
    change = {
        key: array.astype(np.float64) - base.weights[key].astype(np.float64)
        for key, array in model.weights.items()
    }
    state: State = {}
    for target in plan.targets:
        if target.key not in change or change[target.key].shape != target.shape:
            msg = f"weight {target.key!r}: expected shape {target.shape} as the plan has it"
            raise StateError(msg)
        weight = base.weights[target.key].astype(np.float64)
        arrays = _fitted(plan, target, change[target.key], weight, rank)
        state |= {f"{target.key}/{name}": array for name, array in arrays.items()}
    check_state(plan, state)
    folded = fold(base.weights, plan, state)
    total = {key: _square(array) for key, array in change.items()}
    missed = {
        key: _square(array.astype(np.float64) - folded[key].astype(np.float64))
        for key, array in model.weights.items()
    }
    planned = {target.key for target in plan.targets}
    return Adopted(
        state=state,
        share=_joint_share(missed, total, [t.key for t in plan.targets if t.trained]),
        whole=_joint_share(missed, total, total),
        shares={key: _share(missed[key], total[key]) for key in sorted(planned)},
        left_out={
            key: total[key] ** 0.5 for key in sorted(total) if key not in planned if total[key]
        },
    )


def _check(base: ModelFile, model: ModelFile, plan: AdaptationPlan) -> None:
    if base.digest != plan.base_digest:
        msg = f"expected the base of the plan, {plan.base_digest[:16]}, got {base.digest[:16]}"
        raise StateError(msg)
    for name in ("model_id", "type", "kind", "sources_digest", "is_delta"):
        wanted, got = getattr(base, name), getattr(model, name)
        if wanted != got:
            msg = (
                f"{name.replace('_', ' ')}: expected {str(wanted)[:40]!r} as in the base, got "
                f"{str(got)[:40]!r}; only a model retrained from this base can be adopted"
            )
            raise ModelFileError(msg)
    shapes = [{k: a.shape for k, a in file.weights.items()} for file in (base, model)]
    if shapes[0] != shapes[1]:
        msg = "the weights have other shapes than those of the base"
        raise ModelFileError(msg)
    for key, array in model.weights.items():
        if not np.isfinite(array).all():
            msg = f"weight {key!r} has values that are not finite"
            raise ModelFileError(msg)


def _fitted(
    plan: AdaptationPlan, target: Target, change: Wide, weight: Wide, rank: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the arrays of one target that come nearest to the change of its weight."""
    if target.low_rank:
        a, b = _best_pair(target, change / plan.scale, rank)
        return {"a": a, "b": b}
    ((name, shape),) = target.arrays(rank).items()
    if name == "delta":
        return {name: change.astype(np.float32)}
    spread = (1,) * (change.ndim - len(shape)) + shape
    axes = tuple(axis for axis, size in enumerate(spread) if size == 1)
    above, below = (np.sum(x * weight, axis=axes).reshape(shape) for x in (change, weight))
    return {name: np.divide(above, below, out=np.zeros(shape), where=below > 0).astype(np.float32)}


def _best_pair(target: Target, change: Wide, rank: int) -> Pair:
    padding = zip(change.shape, target.padding(), strict=True)
    covered = change[tuple(slice(first, size - behind) for size, (first, behind) in padding)]
    shape_a, shape_b = target.pair_shapes(rank)
    if target.kind == "conv-transpose":
        covered = np.moveaxis(covered, -1, 0)  # (in, window.., out), as a @ b is laid out
    matrix = covered.reshape(*shape_a[:-1], -1)
    identity = np.eye(matrix.shape[-1]).reshape(-1, *shape_b[1:])
    return directions([(matrix, identity)], [1.0]).pair(0, rank)  # type: ignore[list-item]


def _square(array: Wide) -> float:
    return float(np.vdot(array, array))


def _joint_share(
    missed: Mapping[str, float], total: Mapping[str, float], keys: Iterable[str]
) -> float:
    chosen = sorted(keys)
    return _share(sum(missed[key] for key in chosen), sum(total[key] for key in chosen))


def _share(missed: float, total: float) -> float:
    return max(1.0 - missed / total, 0.0) if total else 1.0
