"""Dafne bundles: one examination with its masks in one `.npz` file, as Dafne uploads it."""

import io
import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dafne_federated.core.errors import DataError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.volumes import (
    Case,
    as_float32,
    check_affine,
    check_volume,
    shown,
    voxel_size,
)

_MASK = "mask_"
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RuntimeError,  # encrypted, or packed in a way that Python does not know
    SyntaxError,
    lzma.LZMAError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def read_bundle(path: Path, *, name: str, person: str, site: str) -> Case:
    """Read one Dafne bundle: an `.npz` with ``data``, ``resolution`` and ``mask_<label>``.

    Nothing in it is unpickled. ``affine`` is optional, other entries are ignored. A user of Dafne
    draws in some slices and saves all; like Dafne, which learns from the drawn ones only, nothing
    is concluded from the others.

    Raises:
        DataError: The file is missing, damaged or pickled, or its arrays do not fit together.
    """
    content = _read_npz(path)
    for key in ("data", "resolution"):
        if key not in content:
            msg = f"{shown(path)}: expected an entry {key!r}, got {sorted(content)}"
            raise DataError(msg)
    data, affine = content["data"], None
    check_volume(data, path, "'data'")
    if "affine" in content:
        affine = content["affine"]
        check_affine(affine, path)
        affine = affine.astype(np.float64)
    masks = {}
    for key in sorted(k for k in content if k.startswith(_MASK)):
        mask = content[key]
        if mask.shape != data.shape or mask.dtype.kind not in "fiub":
            got = f"{mask.shape} {mask.dtype}"
            msg = f"{shown(path)}: {key!r}: expected numbers of shape {data.shape}, got {got}"
            raise DataError(msg)
        masks[key.removeprefix(_MASK)] = mask != 0
    spacing = voxel_size(content["resolution"], path)
    return Case(name, person, site, as_float32(data), masks, spacing, affine, partly=True)


def bundle_labels(path: Path) -> list[str]:
    """Return the names of the labels in a bundle, sorted, without reading its arrays.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    except _DAMAGED as error:
        msg = f"{shown(path)}: damaged, cut short or not a bundle ({type(error).__name__})"
        raise DataError(msg) from None
    return sorted(name.removeprefix(_MASK) for name in names if name.startswith(_MASK))


def write_bundle(case: Case, path: Path, comment: str = "") -> None:
    """Write a case as a Dafne bundle (`.npz`, no pickle)."""
    arrays: dict[str, Any] = {
        "data": case.image,
        "resolution": np.array(case.spacing, dtype=np.float64),
        "comment": np.array(comment),
        **{_MASK + name: mask.astype(np.uint8) for name, mask in case.masks.items()},
    }
    if case.affine is not None:
        arrays["affine"] = case.affine
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        msg = f"{shown(path)}: no such file"
        raise DataError(msg)
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = [k for k in archive.files if k in ("data", "resolution", "affine")]
            wanted += [k for k in archive.files if k.startswith(_MASK)]
            return {key: archive[key] for key in wanted}
    except _DAMAGED as error:
        pickled = "Object arrays" in str(error)
        reason = "holds pickled objects" if pickled else "damaged, cut short or not a bundle"
        msg = f"{shown(path)}: {reason}; expected an .npz of plain arrays"
        raise DataError(msg) from None
