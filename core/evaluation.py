"""Apply a model to cases as Dafne would, and compare with the masks that people drew."""

import numpy as np
import numpy.typing as npt

from dafne_federated.core.metrics import Agreement, agreement
from dafne_federated.core.model_runtime import Predict, RunningModel
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.volumes import Case


def evaluate_case(
    model: RunningModel,
    case: Case,
    predict: Predict | None = None,
    classification: str = "",
    cache: BiasFieldCache | None = None,
    distances: bool = True,
) -> list[Agreement]:
    """Return the agreement on one case, in the geometry of its image.

    Args:
        model: The model.
        case: Image and masks; labels that the model does not know are left out.
        predict: Replaces the network, e.g. by an adapted one.
        classification: The class as Dafne names it.
        cache: Keeps bias fields.
        distances: Whether to measure HD95.
    """
    truth = known_masks(model, case)
    found = looked_at(case, truth, model.apply(case, predict, classification, cache))
    return agreement(case.name, truth, found, case.spacing, distances)


def known_masks(model: RunningModel, case: Case) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the masks of ``case`` by the label names of ``model``.

    A mask named with a side, ``..._L`` or ``..._R``, counts for the label without it, as in
    Dafne's own training functions; both sides together make one mask.
    """
    masks: dict[str, npt.NDArray[np.bool_]] = {}
    for name, mask in case.masks.items():
        plain = name[:-2] if name.endswith(("_L", "_R")) and name not in model.labels else name
        if plain in model.labels:
            masks[plain] = masks[plain] | mask if plain in masks else mask
    return masks


def looked_at(
    case: Case, truth: dict[str, npt.NDArray[np.bool_]], found: dict[str, npt.NDArray[np.bool_]]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return predictions, without those in slices that nobody looked at; see ``Case.partly``.

    Args:
        case: The case.
        truth: Its masks for the labels of the model, (rows, columns, slices) bool.
        found: The model's masks, in the same shape.
    """
    if not case.partly or not truth:
        return found
    drawn = np.logical_or.reduce([mask.any(axis=(0, 1)) for mask in truth.values()])
    return {name: mask & drawn for name, mask in found.items()}


def label_map(
    model: RunningModel, masks: dict[str, npt.NDArray[np.bool_]], index: int
) -> npt.NDArray[np.uint8]:
    """Return one slice of masks as label numbers (rows, columns) uint8, 1 for the first label."""
    shape = next(iter(masks.values())).shape[:2]
    labels = np.zeros(shape, np.uint8)
    for number, name in enumerate(model.labels, start=1):
        if name in masks:
            labels[masks[name][..., index]] = number
    return labels
