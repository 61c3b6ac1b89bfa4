"""Train a new Dafne model from scratch: the base of a federation, and its honest baseline."""

import math
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import set_seed
from dafne_federated.core.errors import DataError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.function_sources import LARGEST, SMALLEST, NetworkSpec, check_grid
from dafne_federated.core.model_file import ModelFile, keras_weights
from dafne_federated.core.model_runtime import RunningModel, build_model
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.training import Fit, train_network
from dafne_federated.core.versions import versions
from dafne_federated.core.volumes import Case, plane

# Largest side of the network's input that is proposed, in pixels.
# Source: MAX_INPUT_SIZE of Dafne's own trainer.
_LARGEST = 256


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained from scratch.

    Attributes:
        epochs: At most so many passes.
        patience: Stop after so many epochs without a better validation Dice.
        batch_size: Slices in a step.
        learning_rate: Of Adam at the start.
        seed: All randomness follows from it.
    """

    epochs: int = 60
    patience: int = 15
    batch_size: int = 4
    learning_rate: float = 2e-3
    seed: int = 1


def propose_spec(
    cases: Iterable[Case],
    labels: Sequence[str],
    size: int | None = None,
    resolution: float | None = None,
    filters: Sequence[int] = (16, 32, 64, 128),
    strides: Sequence[int] = (2, 2, 2),
    sides: bool = False,
) -> NetworkSpec:
    """Return a network that sees the cases whole, at their usual pixel size.

    Args:
        cases: Cases to look at.
        labels: Label names, channel 1 first.
        size: Rows and columns of the input, in pixels; by default the largest field of view.
        resolution: Pixel size in mm; by default the median, coarser where the field of view
            would need more than 256 pixels.
        filters: Channels of each level.
        strides: How much smaller each next level is.
        sides: Whether left sides are mirrored; see ``NetworkSpec``.

    Raises:
        DataError: There are no cases, or their field of view needs too many pixels.
        SettingsError: ``size`` or ``resolution`` is out of range.
    """
    check_grid(size, resolution)
    spacings, extents = [], []
    for case in cases:
        spacings.append(case.spacing[:2])
        extents.append(max(n * s for n, s in zip(case.image.shape[:2], case.spacing, strict=False)))
    if not spacings:
        msg = "there are no cases to train on"
        raise DataError(msg)
    pixel = float(np.median(spacings)) if resolution is None else resolution
    if size is None:
        if resolution is None:
            pixel = max(pixel, max(extents) / _LARGEST)
        size = math.ceil(max(extents) / pixel - 1e-6)
    step = math.prod(strides)
    size = max(math.ceil(size / step) * step, SMALLEST)
    if size > LARGEST:
        got = f"{size} for a field of view of {max(extents):.0f} mm at {pixel:g} mm"
        msg = f"expected an input of at most {LARGEST} pixels, got {got}; take larger pixels"
        raise DataError(msg)
    return NetworkSpec(
        labels=tuple(labels),
        size=size,
        resolution=(round(pixel, 4), round(pixel, 4)),
        filters=tuple(filters),
        strides=tuple(strides),
        sides=sides,
    )


def train_base(
    spec: NetworkSpec,
    training: Sequence[Case],
    validation: Sequence[Case],
    name: str,
    settings: FitSettings,
    timestamp_id: int,
    cache: BiasFieldCache | None = None,
    on_case: Callable[[], None] | None = None,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
) -> tuple[ModelFile, Fit]:
    """Train a new model from scratch on ``training``, choosing the epoch on ``validation``.

    Args:
        spec: The network.
        training: Cases to train on.
        validation: Cases of other persons; without any, the last epoch is kept.
        name: Name of the model in Dafne.
        settings: How to train.
        timestamp_id: Version, in seconds since 1970.
        cache: Keeps bias fields.
        on_case: Called after each prepared case.
        on_epoch: Called with epoch, loss and validation Dice.

    Returns:
        The model, not yet written, and how training went.

    Raises:
        DataError: No slice of the training or the validation cases can be trained on.
    """
    set_seed(settings.seed, "network")
    file = build_model("untrained", spec.sources(), timestamp_id, _metadata(spec, training, name))
    with tempfile.TemporaryDirectory() as folder:
        own = Approvals(Path(folder) / "own.json")  # our own functions, written a line above
        own.add(file, "built here from our own functions")
        model = RunningModel(file, own)

    def told(cases: Sequence[Case]) -> Iterable[Case]:
        for case in cases:
            yield case
            if on_case:
                on_case()

    slices = model.prepare_all(iter(told(training)), cache=cache)
    held_out = model.prepare_all(iter(told(validation)), cache=cache) if validation else None
    assert model.loss is not None  # prepare_all kept slices, so the loss was captured
    fit = train_network(
        model.network,
        model.loss,
        slices,
        held_out,
        settings.epochs,
        settings.patience,
        settings.batch_size,
        settings.learning_rate,
        settings.seed,
        on_epoch,
    )
    trained = {
        "epochs": len(fit.history),
        "best_epoch": fit.best_epoch,
        "validation_dice": None if fit.best_dice is None else round(fit.best_dice, 4),
        "training_cases": len(training),
        "seed": settings.seed,
        "software": versions(),
    }
    trained_file = replace(
        file,
        model_id=_identity(spec, name, settings, slices),
        weights=keras_weights(model.network.get_weights()),
        metadata={**file.metadata, "trained": trained},
    )
    return trained_file, fit


def _identity(spec: NetworkSpec, name: str, settings: FitSettings, slices: PreparedSlices) -> str:
    """Return the identity of a new family: the same data and settings give the same one."""
    content: dict[str, npt.NDArray[np.generic]] = {
        "images": slices.images,
        "labels": slices.labels,
    }
    text = f"{name}/{spec.model_dump_json()}/{settings}/{arrays_digest(content)}"
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def _metadata(spec: NetworkSpec, cases: Sequence[Case], name: str) -> dict[str, object]:
    planes = {plane(case.affine) for case in cases if case.affine is not None}
    return {
        "model_name": name,
        "model_type": "DynamicDLModel",
        "dimensionality": "2",
        "variants": ["", "Left", "Right"] if spec.sides else [""],
        "categories": [["Federated"]],
        "orientation": planes.pop() if len(planes) == 1 else "",
        "info": {
            "Description": f"Segmentation of {', '.join(spec.labels)}",
            "Author": "dafne-federated",
            "Modality": "MRI",
            "Link": "https://dafne.network/",
        },
    }
