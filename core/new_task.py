"""Start a new task from a model: other labels, the same trained network behind a new head.

Numpy and syntax trees only: nothing of the model is executed.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import ModelFileError, SettingsError
from dafne_federated.core.label_sources import relabelled
from dafne_federated.core.model_file import (
    ModelFile,
    Weights,
    function_constants,
    model_labels,
    why_not_adaptable,
)

MOST_LABELS: Final = 127  # Dafne's functions keep label numbers as int8
NOISE: Final = 0.01  # of a new column, relative to the spread of the base's whole array

# What a Dafne server takes as the name of a model type.
# Source: ``model_type`` of Dafne's PHP server.
_NAME: Final = re.compile(r"[a-zA-Z0-9() -]*[a-zA-Z0-9][a-zA-Z0-9() -]*")


def new_task(
    base: ModelFile, labels: Sequence[str], seed: int, name: str | None = None
) -> ModelFile:
    """Return a model of a new family that segments ``labels``, started from ``base``.

    The function sources get the new labels. The head keeps the column of the background and of
    each label that the base has by the same name; a new label starts from the mean of the
    base's labels and a little noise, so that it finds foreground from the first step. All
    other weights are those of the base. The same arguments give the same model.

    Args:
        base: A slice-wise Keras model.
        labels: The label names, channel 1 first.
        seed: Seed of the noise.
        name: Name of the new model; by default the base's with "new task" behind it.

    Raises:
        SettingsError: The labels or the name cannot be used.
        ModelFileError: The base is of a kind that cannot be changed so.
    """
    if reason := why_not_adaptable(base):
        msg = f"this model cannot start a new task: {reason}"
        raise ModelFileError(msg)
    old = model_labels(base)
    if not old or sorted(old) != list(range(1, len(old) + 1)):
        msg = f"expected label names for channels 1, 2, ... in the model's sources, got {old}"
        raise ModelFileError(msg)
    old_names = tuple(old[channel] for channel in sorted(old))
    _check_labels(base, old_names, labels)
    identity = f"{base.model_id}/{base.content_digest}/{list(labels)}/{seed}"
    return replace(
        base,
        digest="",
        model_id=str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
        timestamp_id=base.timestamp_id + 1,
        functions=relabelled(base.functions, old, labels),
        weights=_with_new_head(base.weights, old_names, labels, seed),
        metadata=_metadata(base, old_names, labels, seed, name),
    )


def _check_labels(base: ModelFile, old: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse labels that the model could not have, or could not be trained on.

    Source:
        ``common_input_process_single`` and ``_split`` of ``dafne_dl.common.preprocess_train``:
        both take ``_L`` and ``_R`` off the names of masks before they look them up, and the
        latter leaves out slices unless more than (labels + 1) / 2 labels are drawn.
    """
    learn = base.functions["incremental_learn_function"] or ""
    if not 1 <= len(labels) <= MOST_LABELS:
        msg = f"labels: expected 1 to {MOST_LABELS} names, got {len(labels)}"
        raise SettingsError(msg)
    for label in labels:
        if not label or label != label.strip() or not label.isprintable():
            msg = f"labels: expected names of printable characters, no space around, got {label!r}"
            raise SettingsError(msg)
        sided = function_constants(learn).get("SIDES") is not False
        if sided and label.endswith(("_L", "_R")):
            msg = (
                f"labels: {label!r} would never be trained: this model takes '_L' and '_R' off "
                f"the names of masks, to unite both sides; use {label[:-2]!r}"
            )
            raise SettingsError(msg)
    if len(set(labels)) != len(labels):
        msg = f"labels: expected different names, got {', '.join(labels)}"
        raise SettingsError(msg)
    if set(labels) == set(old):
        msg = f"labels: the base has these already ({', '.join(old)}); adapt it as it is"
        raise SettingsError(msg)
    if len(labels) == 1 and "common_input_process_split" in learn:
        msg = (
            "labels: expected at least 2 names, got 1: when this model learns from images of "
            "both sides, it leaves out every slice with a single label"
        )
        raise SettingsError(msg)


def _with_new_head(
    weights: Weights, old: Sequence[str], labels: Sequence[str], seed: int
) -> Weights:
    """Return the weights with another last layer.

    Raises:
        ModelFileError: The last layer is not a kernel, and a bias or none, of the base's
            channels.
    """
    channels = len(old) + 1
    keys = sorted(weights)
    kernels = [key for key in keys if weights[key].ndim > 1]
    head = keys[keys.index(kernels[-1]) :] if kernels else []
    shapes = [weights[key].shape for key in head]
    if len(head) not in (1, 2) or any(shape[-1:] != (channels,) for shape in shapes):
        msg = (
            f"expected a last layer with a kernel and at most a bias, of {channels} output "
            f"channels (background and {len(old)} labels), got arrays of shapes {shapes}"
        )
        raise ModelFileError(msg)
    generator = np.random.default_rng(seed)
    return weights | {key: _columns(weights[key], old, labels, generator) for key in head}


def _columns(
    array: npt.NDArray[Any], old: Sequence[str], labels: Sequence[str], generator: Any
) -> npt.NDArray[Any]:
    """Return (.., labels + 1) for (.., old + 1): background, then kept or new columns.

    Source:
        The start from the base's foreground: 3 points of Dice over a random head after 10
        rounds, in a study on the hippocampus data of the Medical Segmentation Decathlon (one
        data set, one seed: an indication).
    """
    wide = array.astype(np.float64)
    foreground = wide[..., 1:].mean(axis=-1)
    columns = [array[..., 0]]
    for label in labels:
        if label in old:
            columns.append(array[..., old.index(label) + 1])
            continue
        noise = generator.normal(0.0, NOISE * wide.std(), foreground.shape)
        columns.append((foreground + noise).astype(array.dtype))
    return np.stack(columns, axis=-1)


def _metadata(
    base: ModelFile, old: Sequence[str], labels: Sequence[str], seed: int, name: str | None
) -> dict[str, Any]:
    """Return the base's metadata with the new name and task, and where it comes from."""
    base_name = str(base.metadata.get("model_name") or "Model")
    chosen = re.sub(r"[^a-zA-Z0-9() -]", "-", f"{base_name} new task") if name is None else name
    if not _NAME.fullmatch(chosen) or chosen == base_name:
        msg = (
            f"name: expected letters, digits, spaces, '-', '(' and ')' as Dafne servers do, "
            f"and another name than the base's, got {chosen!r}"
        )
        raise SettingsError(msg)
    info = base.metadata.get("info")
    info = dict(info) if isinstance(info, dict) else {}
    task = f"Segmentation of {', '.join(labels)}"
    described = {"description": task} if "description" in base.metadata else {}
    # How the base came about is in the base; it says nothing of this file.
    kept = {key: value for key, value in base.metadata.items() if key != "federated"}
    return {
        **kept,
        **described,
        "model_name": chosen,
        "info": {
            **info,
            "Description": task,
            "Author": f"dafne-federated, from a model of {info.get('Author') or 'unknown'}",
        },
        "derived_from": {
            "base_sha256": base.digest,
            "base_name": base_name,
            "base_model_id": base.model_id,
            "base_timestamp": base.timestamp_id,
            "base_labels": list(old),
            "kept_labels": [label for label in labels if label in old],
            "seed": seed,
        },
    }
