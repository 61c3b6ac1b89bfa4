"""What a simulation measured at the end, on persons that nobody trained on.

test.json           one row per arm, person, case and label
overlays/NN.npz     one slice with its truth and what each arm drew on it
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dafne_federated.core.errors import RunError, first_fault
from dafne_federated.core.files import write_atomic
from dafne_federated.core.run_folder import RunFolder

ARMS: Final = ("base", "local only", "federated")
FINE_TUNED: Final = "fine-tuned"
EVERY_ARM: Final = (*ARMS, FINE_TUNED)


class TestRow(BaseModel):
    """One label of one case as one arm segmented it.

    The truth holds the label exactly if there is a volume error; where it does not, Dice is 0
    if the arm drew the label all the same and None if it rightly drew nothing. A person of a
    site that trained nothing has one row for the local model of each other site.

    Attributes:
        arm: The model: ``base``, ``local only`` (trained at one site alone), ``federated``, or
            ``fine-tuned`` where there are no sites.
        site: Site of the person.
        person: Who was scanned.
        case: Name of the case.
        label: Label name.
        dice: 0 to 1; None if truth and prediction are both empty.
        hd95: In mm; None if either is empty.
        volume_error: Signed, in percent of the true volume; None if the truth is empty.
    """

    __test__: ClassVar[bool] = False

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    arm: str = Field(pattern="^(" + "|".join(EVERY_ARM) + ")$")
    site: str
    person: str
    case: str
    label: str
    dice: float | None = Field(ge=0, le=1)
    hd95: float | None = Field(ge=0)
    volume_error: float | None = Field(ge=-100)

    @model_validator(mode="after")
    def _empty_masks_agree(self) -> Self:
        present = self.volume_error is not None
        if (present and self.dice is None) or (
            not present and (self.dice or self.hd95 is not None)
        ):
            got = f"dice {self.dice}, hd95 {self.hd95}, volume error {self.volume_error}"
            msg = f"expected a Dice with, and no overlap or distance without, a volume; got {got}"
            raise ValueError(msg)
        return self


@dataclass(frozen=True, eq=False)
class Overlay:
    """One slice to look at.

    Attributes:
        site: Site of the person.
        person: Who was scanned.
        case: Name of the case.
        slice_index: Number of the slice, 0 first.
        image: (rows, columns) float32, as stored.
        truth: (rows, columns) uint8, 0 for background, else the label's number in the order
            of the plan, 1 first.
        predictions: The same by arm.
        spacing: (2,) float64, size of a pixel along rows and columns, in mm.
        orientation: Towards what rows and columns run, two letters of L R A P S I; empty where
            unknown.
    """

    site: str
    person: str
    case: str
    slice_index: int
    image: NDArray[np.float32] = field(repr=False)
    truth: NDArray[np.uint8] = field(repr=False)
    predictions: dict[str, NDArray[np.uint8]] = field(repr=False)
    spacing: NDArray[np.float64]
    orientation: str = ""


def save_test_rows(folder: RunFolder, rows: Sequence[TestRow]) -> None:
    """Write the figures into a run folder in place of earlier ones."""
    content = {"rows": [row.model_dump(mode="json") for row in rows]}
    write_atomic(folder.path / "test.json", json.dumps(content, indent=1).encode())


def load_test_rows(folder: RunFolder) -> list[TestRow]:
    """Return the figures in a run folder; none if nothing was tested.

    Raises:
        RunError: The file is damaged.
    """
    path = folder.path / "test.json"
    if not path.exists():
        return []
    try:
        return _TestFile.model_validate_json(path.read_bytes()).rows
    except ValidationError as error:
        msg = f"{path}: {first_fault(error)}"
        raise RunError(msg) from None


def save_overlays(folder: RunFolder, overlays: Sequence[Overlay]) -> None:
    """Write overlays into a run folder in place of earlier ones.

    Raises:
        RunError: An overlay does not hold what it should.
    """
    contents = [_overlay_bytes(overlay) for overlay in overlays]
    for old in _overlay_files(folder):
        old.unlink()
    for number, data in enumerate(contents, start=1):
        write_atomic(folder.path / "overlays" / f"{number:02d}.npz", data)


def load_overlays(folder: RunFolder) -> list[Overlay]:
    """Return the overlays in a run folder, in the order in which they were saved.

    Raises:
        RunError: A file is damaged.
    """
    return [_read_overlay(path) for path in _overlay_files(folder)]


class _TestFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: list[TestRow]


class _About(BaseModel):
    """The words of an overlay, kept beside its arrays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    person: str
    case: str
    slice_index: int = Field(ge=0)
    orientation: str = Field(pattern="^([LR][APSI]|[AP][LRSI]|[SI][LRAP])?$")


def _overlay_files(folder: RunFolder) -> list[Path]:
    return sorted((folder.path / "overlays").glob("[0-9]*.npz"), key=lambda path: int(path.stem))


def _overlay_bytes(overlay: Overlay) -> bytes:
    _check_overlay(overlay, f"overlay of case {overlay.case!r}")
    about = _About(
        site=overlay.site,
        person=overlay.person,
        case=overlay.case,
        slice_index=overlay.slice_index,
        orientation=overlay.orientation,
    )
    arrays: dict[str, Any] = {
        "about": np.frombuffer(about.model_dump_json().encode(), np.uint8),
        "image": overlay.image,
        "truth": overlay.truth,
        "spacing": overlay.spacing,
        **{f"arm {arm}": mask for arm, mask in overlay.predictions.items()},
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _read_overlay(path: Path) -> Overlay:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = _About.model_validate_json(arrays["about"].tobytes())
        overlay = Overlay(
            **about.model_dump(),
            image=arrays["image"],
            truth=arrays["truth"],
            predictions={arm: arrays[f"arm {arm}"] for arm in EVERY_ARM if f"arm {arm}" in arrays},
            spacing=arrays["spacing"],
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as e:
        msg = f"{path}: damaged, cut short or not an overlay ({type(e).__name__})"
        raise RunError(msg) from None
    _check_overlay(overlay, str(path))
    return overlay


def _check_overlay(overlay: Overlay, where: str) -> None:
    shape = overlay.image.shape
    expected: list[tuple[str, NDArray[np.generic], tuple[int, ...], type[np.generic]]] = [
        ("image", overlay.image, shape, np.float32),
        ("truth", overlay.truth, shape, np.uint8),
    ]
    expected += [(arm, mask, shape, np.uint8) for arm, mask in overlay.predictions.items()]
    expected += [("spacing", overlay.spacing, (2,), np.float64)]
    for name, array, wanted, dtype in expected:
        if array.shape != wanted or array.dtype != dtype:
            got = f"{array.shape} {array.dtype}"
            msg = f"{where}: {name}: expected {wanted} {np.dtype(dtype)}, got {got}"
            raise RunError(msg)
    if len(shape) != 2 or 0 in shape:
        msg = f"{where}: image: expected rows and columns, got shape {shape}"
        raise RunError(msg)
    if not np.isfinite(overlay.spacing).all() or (overlay.spacing <= 0).any():
        msg = f"{where}: spacing: expected two lengths in mm above 0, got {overlay.spacing}"
        raise RunError(msg)
