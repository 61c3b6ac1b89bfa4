"""What a check of data reports, and what a model needs of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dafne_federated.core.model_file import ModelFile, function_constants, model_labels

Severity = Literal["error", "warning", "note"]

# Source: Dafne's desktop starts to learn from 5 slices on (setting IL_MIN_SLICES).
LEAST_SLICES = 5
_MOST_NAMES = 8


@dataclass(frozen=True)
class Finding:
    """One thing to know about a data folder.

    Attributes:
        severity: "error" must be put right, "warning" should be looked at, "note" is for
            information.
        case: Name of the case; empty when it is about the whole folder.
        what: What was found, in words for the person who drew the masks.
        advice: What to do about it.
    """

    severity: Severity
    case: str
    what: str
    advice: str


@dataclass(frozen=True)
class ModelExpectation:
    """What a model needs of the data.

    Attributes:
        labels: Its label names; empty when unknown.
        plane: "Axial", "Sagittal", "Coronal", or empty when any will do.
        spacing: Pixel size of its input along rows and columns, in mm; None when unknown.
        size: Rows and columns of its input, in pixels; None when unknown.
        least_slices: Fewest slices from which Dafne learns.
        least_labels: Labels that a slice must have for the model to learn from it; None for
            more than half of them, the rule of Dafne's own models.
    """

    labels: tuple[str, ...]
    plane: str
    spacing: tuple[float, float] | None
    size: tuple[int, int] | None
    least_slices: int = LEAST_SLICES
    least_labels: int | None = None


def expectation_of(model: ModelFile) -> ModelExpectation:
    """Return what a model needs, as far as its file states it; nothing is executed.

    Source: Dafne goes by the first letter of the orientation; 'Transversal' is axial.
    """
    constants = function_constants(model.functions.get("incremental_learn_function"))
    planes = {"a": "Axial", "t": "Axial", "s": "Sagittal", "c": "Coronal"}
    first = str(model.metadata.get("orientation") or "").strip().lower()[:1]
    size = _pair(constants.get("MODEL_SIZE"))
    return ModelExpectation(
        labels=tuple(name for _, name in sorted((model_labels(model) or {}).items())),
        plane=planes.get(first, ""),
        spacing=_pair(constants.get("MODEL_RESOLUTION")),
        size=None if size is None else (int(size[0]), int(size[1])),
        least_labels=constants.get("LEAST_LABELS"),
    )


def model_label(name: str, labels: Sequence[str]) -> str | None:
    """Return the model's label that a drawn label counts as, or None.

    Source: Dafne drops ``_L`` and ``_R`` where the rest is a label of the model.
    """
    base = name[:-2] if name.endswith(("_L", "_R")) else name
    if base in labels:
        return base
    return name if name in labels else None


def enumerated(names: Sequence[object]) -> str:
    """Return names as "a, b and c"; beyond eight, the first ones and how many more."""
    words = [str(name) for name in names]
    if len(words) > _MOST_NAMES:
        words = [*words[: _MOST_NAMES - 1], f"{len(words) - _MOST_NAMES + 1} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _pair(value: Any) -> tuple[float, float] | None:
    numbers = value[:2] if isinstance(value, (list, tuple)) else []
    if len(numbers) != 2 or not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
        return None
    return float(numbers[0]), float(numbers[1])
