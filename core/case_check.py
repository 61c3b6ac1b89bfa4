"""What is wrong with one case: its grey values, its labels, its fit to a model."""

import difflib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dafne_federated.core.bundles import read_bundle
from dafne_federated.core.dataset import CaseRef
from dafne_federated.core.errors import DataError
from dafne_federated.core.findings import Finding, ModelExpectation, enumerated, model_label
from dafne_federated.core.volumes import (
    DAFNE_ORIENTATION,
    Case,
    as_float32,
    geometry_difference,
    masks_by_name,
    orientation,
    plane,
    read_label_map,
    read_volume,
    unnamed_values,
)

_LEAST_PIXELS = 5
_AXIS = {letter: axis for axis in ("LR", "AP", "SI") for letter in axis}


def read_for_check(ref: CaseRef, labels: Mapping[int, str]) -> tuple[Case | None, list[Finding]]:
    """Read as much of a case as can be read; what does not fit is left out and reported.

    Returns:
        The case, or None where a file cannot be read at all, and what was found on the way.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    findings: list[Finding] = []
    try:
        if ref.is_bundle:
            return read_bundle(ref.image, name=ref.name, person=ref.person, site=ref.site), []
        image = read_volume(ref.image)
        label_map = None if ref.label is None else read_label_map(ref.label)
    except DataError as error:
        advice = "Export or copy the file again, or take the case out of the folder."
        return None, [Finding("error", ref.name, f"It cannot be read: {error}.", advice)]
    if label_map is not None:
        unnamed = unnamed_values(label_map.array, labels)
        if unnamed:
            what = f"Numbers without a name in the labels: {enumerated(unnamed)}."
            advice = "Name the structure in dataset.json, or erase it from the labels."
            findings.append(Finding("error", ref.name, what, advice))
        difference = geometry_difference(image, label_map)
        if difference is None:
            masks = masks_by_name(label_map.array, labels)
        else:
            what = f"Image and labels do not lie in the same place: {difference}."
            advice = "Save the labels on the very image on which they were drawn."
            findings.append(Finding("error", ref.name, what, advice))
    array = as_float32(image.array)
    case = Case(ref.name, ref.person, ref.site, array, masks, image.spacing, image.affine)
    return case, findings


def check_case(
    case: Case, labels: Sequence[str], expected: ModelExpectation | None
) -> Iterator[Finding]:
    """Find what is wrong with a case that could be read.

    Args:
        case: What to look at.
        labels: Names that drawn labels should have.
        expected: What the model needs, or None to look at the case alone.
    """
    yield from _check_grey_values(case)
    least = None if expected is None else expected.least_labels
    yield from _check_labels(case, labels, least)
    if expected is not None:
        yield from _check_plane(case, expected)
        yield from _check_pixels(case, expected)
        yield from _check_view(case, labels, expected)


def drawn_labels(case: Case, labels: Sequence[str]) -> set[str]:
    """Return which of ``labels`` have at least one voxel in the case."""
    counted = (model_label(name, labels) for name, mask in case.masks.items() if mask.any())
    return {label for label in counted if label is not None}


def labelled_slices(case: Case) -> NDArray[np.bool_]:
    """Say in which slices anything is drawn, as (slices,) bool."""
    slices = np.zeros(case.image.shape[2], dtype=np.bool_)
    for mask in case.masks.values():
        slices |= mask.any(axis=(0, 1))
    return slices


def usable_slices(case: Case, labels: Sequence[str], least: int | None = None) -> NDArray[np.bool_]:
    """Say from which slices Dafne would learn, as (slices,) bool.

    Args:
        case: The case.
        labels: Labels of the model.
        least: Labels that a slice must have; None for the rule of Dafne's own models.

    Source: dafne_dl ``common_input_process_single`` counts labels with more than 5 pixels and
    skips a slice in which fewer than (K + 1) / 2 of the model's K labels count. Left and right
    of one label are taken together here.
    """
    pixels = np.zeros((len(labels), case.image.shape[2]), dtype=np.int64)
    for name, mask in case.masks.items():
        label = model_label(name, labels)
        if label is not None:
            pixels[list(labels).index(label)] += np.count_nonzero(mask, axis=(0, 1))
    counted = np.count_nonzero(pixels > _LEAST_PIXELS, axis=0)
    return np.asarray(2 * counted >= len(labels) + 1 if least is None else counted >= least)


def labels_needed(labels: Sequence[str], least: int | None = None) -> str:
    """Say in words what Dafne needs in a slice to learn from it; see ``usable_slices``."""
    least = len(labels) // 2 + 1 if least is None else least
    if least == 1:
        return f"Dafne learns from slices with more than {_LEAST_PIXELS} labelled pixels."
    return (
        f"Dafne learns from slices in which at least {least} of the {len(labels)} labels have "
        f"more than {_LEAST_PIXELS} pixels each: draw more labels in the same slice."
    )


def _check_grey_values(case: Case) -> Iterator[Finding]:
    advice = "Export the image again from the scanner or archive."
    odd = int(np.count_nonzero(~np.isfinite(case.image)))
    if odd:
        what = f"Voxels of the image that hold no number, or infinity: {odd}."
        yield Finding("error", case.name, what, advice)
        return
    flat = case.image.min(axis=(0, 1)) == case.image.max(axis=(0, 1))
    if case.image.min() == case.image.max():
        what = f"The image is empty: every voxel has the value {case.image.flat[0]:g}."
        yield Finding("error", case.name, what, advice)
    elif (flat & labelled_slices(case)).any():
        slices = enumerated([int(s) for s in np.flatnonzero(flat & labelled_slices(case))])
        what = f"Labels are drawn in slices that show nothing (counted from 0): {slices}."
        yield Finding("warning", case.name, what, "Erase the labels there, or export again.")


def _check_labels(case: Case, labels: Sequence[str], least: int | None) -> Iterator[Finding]:
    names = sorted(name for name, mask in case.masks.items() if mask.any())
    if not names:
        advice = "Draw the labels, or take the case out of the folder."
        yield Finding("warning", case.name, "No label is drawn on this image.", advice)
        return
    for name in names:
        if model_label(name, labels) is None:
            what = f"The label {name!r} is not among the labels asked for: "
            near = difflib.get_close_matches(name, labels, n=1, cutoff=0.7)
            advice = f"Rename it if it means {near[0]!r}" if near else "Rename it if it is one"
            advice += "; otherwise it will not be used."
            yield Finding("warning", case.name, f"{what}{enumerated(labels)}.", advice)
    drawn = drawn_labels(case, labels)
    missing = [label for label in labels if label not in drawn]
    if drawn and missing:
        advice = "Right if they lie outside the image; otherwise draw them."
        yield Finding("note", case.name, f"Not drawn here: {enumerated(missing)}.", advice)
    if not usable_slices(case, labels, least).any():
        what = "No slice of it has enough labels for Dafne to learn from."
        yield Finding("warning", case.name, what, labels_needed(labels, least))


def _check_plane(case: Case, expected: ModelExpectation) -> Iterator[Finding]:
    if not expected.plane:
        return
    wanted = expected.plane.lower()
    if case.affine is None:
        what = "The file does not say how the image lies in the body."
        advice = f"Make sure that its slices are {wanted}, and which side is left."
        yield Finding("warning", case.name, what, advice)
        return
    found = plane(case.affine).lower()
    if found != wanted:
        what = f"The slices are {found}, the model works on {wanted} ones."
        advice = f"Use {wanted} images, or a model for {found} ones."
        yield Finding("error", case.name, what, advice)
    elif _AXIS[orientation(case.affine)[0]] != _AXIS[DAFNE_ORIENTATION[expected.plane][0]]:
        what = "The slices lie on their side compared with how Dafne shows them to a model."
        advice = "Save image and labels with rows and columns exchanged."
        yield Finding("warning", case.name, what, advice)


def _check_pixels(case: Case, expected: ModelExpectation) -> Iterator[Finding]:
    if expected.spacing is None:
        return
    factors = np.divide(case.spacing[:2], expected.spacing)
    if factors.max() > 2 or factors.min() < 0.5:
        ours, theirs = (f"{a:.3g} x {b:.3g} mm" for a, b in (case.spacing[:2], expected.spacing))
        what = f"The pixels measure {ours}, those of the model {theirs}."
        advice = "Expect poor results: the model was made for much finer or coarser images."
        yield Finding("warning", case.name, what, advice)


def _check_view(case: Case, labels: Sequence[str], expected: ModelExpectation) -> Iterator[Finding]:
    if expected.spacing is None or expected.size is None:
        return
    rows, columns = (
        _kept(case.image.shape[axis], case.spacing[axis] / expected.spacing[axis], size)
        for axis, size in enumerate(expected.size)
    )
    inside = rows[:, np.newaxis, np.newaxis] & columns[np.newaxis, :, np.newaxis]
    masks = [mask for name, mask in case.masks.items() if model_label(name, labels) is not None]
    voxels = sum(int(np.count_nonzero(mask)) for mask in masks)
    cut = sum(int(np.count_nonzero(mask & ~inside)) for mask in masks)
    if cut:
        view = " x ".join(
            f"{size * mm:.0f}" for size, mm in zip(expected.size, expected.spacing, strict=True)
        )
        what = (
            f"The model does not see {max(0.1, 100 * cut / voxels):.1f} % of the labelled voxels: "
            f"it looks at the middle {view} mm of a slice."
        )
        yield Finding(
            "warning", case.name, what, "Crop the image so that the structures lie in its middle."
        )


def _kept(pixels: int, factor: float, size: int) -> NDArray[np.bool_]:
    """Say which pixels of one axis reach the network, as (pixels,) bool.

    Source: dafne_dl resamples by spacing / model spacing, and ``padorcut`` keeps the middle.
    """
    start = max(0, (round(pixels * factor) - size) // 2)
    centres = (np.arange(pixels) + 0.5) * factor
    return np.asarray((centres >= start) & (centres < start + size))
