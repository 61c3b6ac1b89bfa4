"""One examination and its masks, and NIfTI pairs on disk; nothing is ever flipped."""

import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from dafne_federated.core.errors import DataError
from dafne_federated.core.files import write_atomic

# Direction in which rows, columns and slices run when Dafne shows a plane, in the letters of
# `orientation`. Source: Dafne brings axial images to ('LR', 'AP', 'SI'), sagittal ones to
# ('AP', 'IS', 'LR') and coronal ones to ('LR', 'SI', 'AP'), each pair read "from, to".
DAFNE_ORIENTATION: Final[Mapping[str, str]] = {"Axial": "RPI", "Sagittal": "PSR", "Coronal": "RIP"}

_PLANE: Final[Mapping[str, str]] = {
    **dict.fromkeys("LR", "Sagittal"),
    **dict.fromkeys("AP", "Coronal"),
    **dict.fromkeys("SI", "Axial"),
}
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)


@dataclass(frozen=True, eq=False)
class Case:
    """One image with its masks, in the axes in which it is stored: nothing is flipped.

    Attributes:
        name: File stem, unique in its folder.
        person: Who was scanned; the unit in which data are split.
        site: Where; empty when unknown.
        image: (rows, columns, slices) float32.
        masks: Label name -> (rows, columns, slices) bool. A label that the file could hold but
            has no voxel is an all-False mask; a label that nobody annotated is absent.
        spacing: Size of a voxel along rows, columns and slices, in mm.
        affine: (4, 4) float64 from voxel index to mm in the scanner; None when unknown.
        partly: Whether slices in which nothing is drawn are ones that nobody looked at.
    """

    name: str
    person: str
    site: str
    image: NDArray[np.float32] = field(repr=False)
    masks: dict[str, NDArray[np.bool_]] = field(repr=False)
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64] | None
    partly: bool = False


@dataclass(frozen=True, eq=False)
class Volume:
    """One stored array and its place in the scanner.

    Attributes:
        array: (rows, columns, slices), any real dtype, with the file's scaling applied.
        spacing: Size of a voxel along each axis, in mm.
        affine: (4, 4) float64 from voxel index to mm; None when the file does not say.
    """

    array: NDArray[Any] = field(repr=False)
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64] | None


def read_nifti_pair(
    image: Path, label: Path | None, labels: Mapping[int, str], *, name: str, person: str, site: str
) -> Case:
    """Read an image and its label map, both as stored.

    Args:
        image: A NIfTI file of (rows, columns, slices).
        label: A NIfTI file of the same geometry that holds one number per voxel, or None.
        labels: Label names by that number; two numbers may share a name.
        name: Name of the case.
        person: Who was scanned.
        site: Where; empty when unknown.

    Raises:
        DataError: A file cannot be read, the two do not lie in the same place, or the label
            map holds a number without a name.
    """
    volume = read_volume(image)
    masks: dict[str, NDArray[np.bool_]] = {}
    if label is not None:
        label_map = read_label_map(label)
        difference = geometry_difference(volume, label_map)
        if difference is not None:
            msg = f"{shown(label)} does not fit its image: {difference}"
            raise DataError(msg)
        unnamed = unnamed_values(label_map.array, labels)
        if unnamed:
            msg = f"{shown(label)}: expected only {sorted(labels)} as labels, got {unnamed}"
            raise DataError(msg)
        masks = masks_by_name(label_map.array, labels)
    array = as_float32(volume.array)
    return Case(name, person, site, array, masks, volume.spacing, volume.affine)


def read_volume(path: Path) -> Volume:
    """Read one NIfTI file of three dimensions.

    Without a stated orientation (sform and qform code 0) the affine is None: what nibabel
    makes up in that case says nothing about left and right.

    Raises:
        DataError: The file is missing, damaged, or not a volume of real numbers.
    """
    if not path.is_file():
        msg = f"{shown(path)}: no such file"
        raise DataError(msg)
    try:
        stored = nib.load(path, mmap=False)
        array = np.asanyarray(stored.dataobj)
    except _DAMAGED as error:
        msg = f"{shown(path)}: damaged, cut short or not NIfTI ({type(error).__name__})"
        raise DataError(msg) from None
    if not isinstance(stored, nib.Nifti1Image):
        msg = f"{shown(path)}: expected NIfTI, got {type(stored).__name__}"
        raise DataError(msg)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    check_volume(array, path, "image data")
    stated = int(stored.header["sform_code"]) or int(stored.header["qform_code"])
    affine = np.asarray(stored.affine, dtype=np.float64) if stated else None
    sizes = stored.header.get_zooms()[:3]
    if affine is not None:
        check_affine(affine, path)
        sizes = voxel_sizes(affine)
    return Volume(array, voxel_size(sizes, path), affine)


def read_label_map(path: Path) -> Volume:
    """Read a NIfTI file of label numbers; the array comes as uint16.

    Raises:
        DataError: As for ``read_volume``, or a voxel holds no whole number from 0 to 65535.
    """
    volume = read_volume(path)
    array = volume.array
    whole = (array >= 0) & (array <= 65535)
    if array.dtype.kind == "f":
        whole &= array == np.rint(array)
    if not whole.all():
        odd = array[~whole][0]
        msg = f"{shown(path)}: expected whole label numbers from 0 to 65535, got {odd}"
        raise DataError(msg)
    return Volume(array.astype(np.uint16), volume.spacing, volume.affine)


def geometry_difference(image: Volume, label: Volume) -> str | None:
    """Say in words how a label map lies elsewhere than its image, or return None.

    Rounding in the header is forgiven: no corner may be further off than half the smallest
    side of a voxel.
    """
    if image.array.shape != label.array.shape:
        ours, theirs = (" x ".join(map(str, v.array.shape)) for v in (image, label))
        return f"the image has {ours} voxels, the labels {theirs}"
    pairs = zip(image.spacing, label.spacing, strict=True)
    if not all(np.isclose(a, b, rtol=0.01) for a, b in pairs):
        ours, theirs = (" x ".join(f"{s:.3g}" for s in v.spacing) for v in (image, label))
        return f"the image's voxels measure {ours} mm, the labels' {theirs} mm"
    if image.affine is None or label.affine is None:
        return None
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(image.array.shape) - 1)
    apart = apply_affine(image.affine, corners) - apply_affine(label.affine, corners)
    distance = float(np.linalg.norm(apart, axis=1).max())
    if distance > 0.5 * min(image.spacing):
        return f"they lie up to {distance:.1f} mm apart in the scanner"
    return None


def unnamed_values(label_map: NDArray[np.uint16], labels: Mapping[int, str]) -> list[int]:
    """Return the numbers in a label map that have no name, 0 (background) aside."""
    present = np.flatnonzero(np.bincount(label_map.ravel()))
    return [int(value) for value in present if value != 0 and int(value) not in labels]


def masks_by_name(
    label_map: NDArray[np.uint16], labels: Mapping[int, str]
) -> dict[str, NDArray[np.bool_]]:
    """Return one (rows, columns, slices) bool mask per label name, empty ones included."""
    masks: dict[str, NDArray[np.bool_]] = {}
    for value in sorted(labels):
        mask = label_map == value
        name = labels[value]
        masks[name] = masks[name] | mask if name in masks else mask
    return masks


def write_nifti_pair(
    case: Case, image: Path, label: Path | None, labels: Mapping[int, str]
) -> None:
    """Write a case as an image of float32 and, unless ``label`` is None, a label map.

    The voxel size that is written is that of the affine, where the case has one. Equal cases
    give equal bytes.

    Raises:
        DataError: Two masks overlap or a mask has no number, which one map cannot hold.
    """
    if label is not None:
        numbers = {name: value for value, name in sorted(labels.items(), reverse=True)}
        unnumbered = sorted(set(case.masks) - set(numbers))
        if unnumbered:
            msg = f"case {case.name!r}: expected only labels {sorted(numbers)}, got {unnumbered}"
            raise DataError(msg)
        dtype = np.uint8 if max(labels, default=0) < 256 else np.uint16
        label_map = np.zeros(case.image.shape, dtype)
        for name, mask in case.masks.items():
            if label_map[mask].any():
                msg = f"case {case.name!r}: mask {name!r} overlaps another, a label map cannot"
                raise DataError(msg)
            label_map[mask] = numbers[name]
        _write_nifti(label_map, case, label)
    _write_nifti(case.image, case, image)


def orientation(affine: NDArray[np.float64]) -> str:
    """Return towards what rows, columns and slices run, e.g. ``"RAS"``: right, front, head.

    Raises:
        DataError: The affine does not span three directions.
    """
    codes = nib.aff2axcodes(affine)
    if None in codes:
        msg = f"expected an affine of three directions, got {np.round(affine, 3).tolist()}"
        raise DataError(msg)
    return "".join(codes)


def plane(affine: NDArray[np.float64]) -> str:
    """Return the plane of the slices, ``"Axial"``, ``"Sagittal"`` or ``"Coronal"``.

    Oblique slices count as the plane that is nearest.
    """
    return _PLANE[orientation(affine)[2]]


def check_volume(array: NDArray[Any], path: Path, what: str) -> None:
    """Refuse what is not an array of real numbers in rows, columns and slices."""
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "fiub":
        got = f"{array.dtype} of shape {array.shape}"
        msg = f"{shown(path)}: {what}: expected real numbers in rows, columns, slices, got {got}"
        raise DataError(msg)


def check_affine(affine: NDArray[Any], path: Path) -> None:
    """Refuse what is not a finite (4, 4) matrix that spans three directions."""
    good = affine.shape == (4, 4) and affine.dtype.kind in "fiu" and np.isfinite(affine).all()
    if not good or np.linalg.matrix_rank(affine[:3, :3].astype(np.float64)) < 3:
        got = np.round(affine, 3).tolist() if affine.dtype.kind in "fiu" else affine.dtype
        msg = f"{shown(path)}: affine: expected a (4, 4) matrix with three directions, got {got}"
        raise DataError(msg)


def voxel_size(sizes: Any, path: Path) -> tuple[float, float, float]:
    """Return three lengths above 0, in mm, as plain numbers."""
    values = np.asarray(sizes)
    good = values.shape == (3,) and values.dtype.kind in "fiu"
    if not good or not np.isfinite(values).all() or (values <= 0).any():
        got = values.tolist()
        msg = f"{shown(path)}: voxel size: expected three lengths in mm above 0, got {got}"
        raise DataError(msg)
    # NIfTI keeps float32: the digits past 1e-6 mm are noise of that rounding
    rows, columns, slices = (round(float(value), 6) for value in values)
    return rows, columns, slices


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values as float32, a value out of its range as infinite."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def shown(path: Path) -> str:
    """Name a file by its folder and name: an image and its labels share the name."""
    return repr(f"{path.parent.name}/{path.name}")


def _write_nifti(array: NDArray[Any], case: Case, path: Path) -> None:
    image = nib.Nifti1Image(array, case.affine)
    image.header.set_xyzt_units("mm")
    if case.affine is None:
        image.header.set_zooms(case.spacing)
    else:
        image.set_sform(case.affine, code="scanner")
        image.set_qform(case.affine, code="scanner")
    data = image.to_bytes()
    write_atomic(path, gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
