"""How well a mask agrees with the truth: Dice, HD95 and volume error, empty masks defined."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import distance

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """One label of one case; None where the figure has no meaning.

    Attributes:
        case: Name of the case.
        label: Label name.
        dice: 0 to 1; None if truth and prediction are both empty.
        hd95: 95th percentile of the surface distance in mm; None if either is empty.
        volume_error: 100 * (predicted - true) / true in percent; None if the truth is empty.
    """

    case: str
    label: str
    dice: float | None
    hd95: float | None
    volume_error: float | None


def dice(truth: Mask, predicted: Mask) -> float | None:
    """Return 2 |A and B| / (|A| + |B|), or None if both masks are empty."""
    if not truth.any() and not predicted.any():
        return None
    return 1.0 - float(distance.dice(truth.ravel(), predicted.ravel()))


def hd95(truth: Mask, predicted: Mask, spacing: Sequence[float]) -> float | None:
    """Return the 95th percentile of the symmetric surface distance in mm.

    Args:
        truth: (rows, columns, slices) bool.
        predicted: The same.
        spacing: Voxel size along these axes, in mm.

    Returns:
        The distance, or None if either mask is empty.

    Source:
        ``monai.metrics.compute_hausdorff_distance``: the larger of the two directed 95th
        percentiles.
    """
    if not truth.any() or not predicted.any():
        return None
    import torch
    from monai.metrics import compute_hausdorff_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = compute_hausdorff_distance(
            torch.from_numpy(predicted[np.newaxis, np.newaxis].astype(np.float32)),
            torch.from_numpy(truth[np.newaxis, np.newaxis].astype(np.float32)),
            include_background=True,
            percentile=95,
            spacing=[tuple(float(step) for step in spacing)],
        )
    return float(value[0, 0])


def volume_error(truth: Mask, predicted: Mask) -> float | None:
    """Return the relative volume error in percent, or None if the truth is empty."""
    true = int(truth.sum())
    return 100.0 * (int(predicted.sum()) - true) / true if true else None


def agreement(
    case: str,
    truth: Mapping[str, Mask],
    predicted: Mapping[str, Mask],
    spacing: Sequence[float],
    distances: bool = True,
) -> list[Agreement]:
    """Return the agreement of every label that was annotated in ``truth``.

    Args:
        case: Name of the case.
        truth: Masks by label name; a label that is not there was not annotated.
        predicted: Masks by label name.
        spacing: Voxel size in mm.
        distances: Whether to compute HD95, which takes most of the time.
    """
    rows = []
    for label, mask in truth.items():
        found = predicted.get(label, np.zeros_like(mask))
        far = hd95(mask, found, spacing) if distances else None
        rows.append(Agreement(case, label, dice(mask, found), far, volume_error(mask, found)))
    return rows


def judged(rows: Sequence[Agreement]) -> list[Agreement]:
    """Return the rows whose truth holds the label: only over these is a Dice averaged.

    Where it does not, a model can only be right (nothing drawn) or wrong (anything drawn), and
    a 0 for a single stray pixel would drown what is measured elsewhere; such cases are counted
    and shown apart.
    """
    return [row for row in rows if row.volume_error is not None]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that exist, or None if there are none."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def mean_dice(rows: Sequence[Agreement]) -> float | None:
    """Return the mean over labels of the mean over judged cases: every label counts the same."""
    kept = judged(rows)
    labels = sorted({row.label for row in kept})
    return mean([mean([row.dice for row in kept if row.label == label]) for label in labels])
