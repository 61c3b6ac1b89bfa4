"""The Dafne `.model` file: read without executing anything, write what upstream loads."""

import ast
import contextlib
import importlib.util
import json
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.files import arrays_digest, sha256, write_atomic
from dafne_federated.core.restricted_pickle import read_pickle

Weights = dict[str, npt.NDArray[np.generic]]
Kind = Literal["keras", "torch", "ensemble", "none"]
Plain = TypeVar("Plain", int, str, bool)

# Metadata that a Dafne provider adds while a model is in use; never part of a file.
# Source: dafne_dl RemoteModelProvider.load_model.
_TRANSIENT = ("hash", "hashes", "timestamps")

_LATEST = 253_370_764_800  # 9999-01-01, in seconds since 1970; dates end with that year
_UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)


@dataclass(frozen=True)
class ModelFile:
    """The content of one `.model` file, as plain values.

    Attributes:
        digest: SHA-256 of the bytes that were read; empty for content not yet written.
        model_id: Identity of the model family; stays the same over all versions.
        timestamp_id: Version within the family, in seconds since 1970.
        type: Dafne class that runs the model, e.g. ``DynamicDLModel`` (Keras).
        dimensionality: 2 (one slice at a time) or 3.
        is_delta: Whether the weights are a difference to another version.
        metadata: What Dafne shows and keeps; JSON values in every file that is written here.
        functions: Function sources by their key in the file; None where there is none.
        kind: How the weights are kept: a Keras list, a torch dictionary, a list of those.
        weights: Arrays by weight key: the four-digit position in ``get_weights()`` order for
            Keras, the ``state_dict`` name for torch, ``<member>/<name>`` for an ensemble.
    """

    digest: str
    model_id: str
    timestamp_id: int
    type: str
    dimensionality: int
    is_delta: bool
    metadata: dict[str, Any]
    functions: dict[str, str | None]
    kind: Kind
    weights: Weights = field(repr=False)

    @property
    def parameters(self) -> int:
        """Number of values in all weight arrays."""
        return sum(array.size for array in self.weights.values())

    @property
    def content_digest(self) -> str:
        """SHA-256 of weights, identity and sources, without times.

        Two runs of the same settings must agree in it: ``timestamp_id`` and the dates in the
        metadata are left out.
        """
        text = json.dumps([self.model_id, self.type, self.functions], sort_keys=True)
        return sha256(f"{text}\n{arrays_digest(self.weights)}".encode())

    @property
    def sources_digest(self) -> str:
        """SHA-256 of the function sources: what runs, whatever the weights are."""
        return sha256(json.dumps(self.functions, sort_keys=True).encode())


def read_model(path: Path) -> ModelFile:
    """Read a `.model` file; nothing in it is executed.

    Raises:
        ModelFileError: The file is missing, cut short, not a Dafne model, or asks for
            anything that a Dafne model does not need.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"cannot read model {str(path)!r}: {error.strerror}"
        raise ModelFileError(msg) from None
    try:
        return parse_model(data)
    except ModelFileError as error:
        msg = f"{path.name}: {error}"
        raise ModelFileError(msg) from None


def parse_model(data: bytes) -> ModelFile:
    """Return the content of the bytes of a `.model` file; nothing in it is executed.

    Raises:
        ModelFileError: As for ``read_model``.
    """
    content = read_pickle(data)
    if not isinstance(content, dict) or "model_id" not in content:
        msg = f"expected a dictionary with a 'model_id', got {type(content).__name__}"
        raise ModelFileError(msg)
    functions = {k: v for k, v in content.items() if isinstance(k, str) and "_function" in k}
    for key, source in functions.items():
        if source is not None and not isinstance(source, str):
            msg = f"{key}: expected the source text of a function, got {type(source).__name__}"
            raise ModelFileError(msg)
    kind, weights = _weights(content.get("weights"))
    if not isinstance(content["model_id"], str):
        msg = (
            f"model_id: expected a text, got {getattr(content['model_id'], 'text', None)!r} "
            f"(a file of Dafne's own trainer carries no identity; give it one first)"
        )
        raise ModelFileError(msg)
    timestamp = content.get("timestamp_id")
    if type(timestamp) is not int or not 0 <= timestamp < _LATEST:
        got = timestamp if isinstance(timestamp, (int, float, str)) else type(timestamp).__name__
        msg = f"expected a whole timestamp_id, seconds from 1970 to the year 9998, got {got!r:.80}"
        raise ModelFileError(msg)
    dimensionality = _value(content, "data_dimensionality", int, 2)
    if dimensionality not in (2, 3):
        msg = f"data_dimensionality: expected 2 or 3, got {dimensionality}"
        raise ModelFileError(msg)
    metadata = content.get("metadata") or {}
    return ModelFile(
        digest=sha256(data),
        model_id=content["model_id"],
        timestamp_id=timestamp,
        type=_value(content, "type", str, "DynamicDLModel"),
        dimensionality=dimensionality,
        is_delta=_value(content, "is_delta", bool, False),
        metadata=dict(metadata) if isinstance(metadata, dict) else {"metadata": metadata},
        functions=functions,
        kind=kind,
        weights=weights,
    )


def write_model(model: ModelFile, path: Path) -> ModelFile:
    """Write ``model`` so that Dafne loads it, and return it with the digest of its bytes.

    The file is a plain pickle (protocol 4) of the flat dictionary that ``dafne_dl`` dumps;
    what a Dafne provider adds to the metadata while a model is in use is left out.

    Raises:
        ModelFileError: A weight is not finite, the metadata is not JSON, or the model is not
            a Keras model.
    """
    data = serialise_model(model)
    write_atomic(path, data)
    return replace(model, digest=sha256(data))


def serialise_model(model: ModelFile) -> bytes:
    """Return the bytes of a `.model` file for ``model``; see ``write_model``."""
    if model.kind != "keras":
        msg = f"can only write Keras models, got {model.kind!r} weights of type {model.type!r}"
        raise ModelFileError(msg)
    for key, array in model.weights.items():
        if not np.isfinite(array).all():
            msg = (
                f"weight {key!r} has {int((~np.isfinite(array)).sum())} values that are not finite"
            )
            raise ModelFileError(msg)
    metadata = _kept(model.metadata)
    if reason := _not_json(metadata):
        msg = f"metadata is not JSON: {reason}"
        raise ModelFileError(msg)
    content = {
        "model_id": model.model_id,
        "weights": [np.ascontiguousarray(model.weights[key]) for key in sorted(model.weights)],
        "timestamp_id": model.timestamp_id,
        "is_delta": model.is_delta,
        "data_dimensionality": model.dimensionality,
        "type": model.type,
        "metadata": metadata,
        **model.functions,
    }
    return pickle.dumps(content, protocol=4)


def keras_weights(arrays: list[npt.NDArray[Any]]) -> Weights:
    """Return arrays in ``get_weights()`` order by weight key."""
    return {f"{index:04d}": np.asarray(array) for index, array in enumerate(arrays)}


def why_not_adaptable(model: ModelFile) -> str | None:
    """Return in words why ``model`` cannot be adapted, or None as far as the file shows."""
    if model.kind != "keras" or model.type != "DynamicDLModel":
        return f"only Keras models (DynamicDLModel) can be adapted so far, this is a {model.type}"
    if model.is_delta:
        return "the file holds a difference between two versions, not a model"
    for key in ("init_model_function", "apply_model_function", "incremental_learn_function"):
        if not model.functions.get(key):
            return f"it has no {key.replace('_', ' ')}"
    if model.dimensionality != 2:
        return "its function sources work on volumes; only slice-wise (2D) models so far"
    for key, array in model.weights.items():
        if not np.isfinite(array).all():
            return f"weight {key!r} has values that are not finite"
    if reason := _not_json(_kept(model.metadata)):
        return f"it could not be written again, its metadata is not JSON: {reason}"
    return None


def function_constants(source: str | None) -> dict[str, Any]:
    """Return the literal constants that a function assigns at its top, such as ``LABELS_DICT``.

    The source is parsed, never executed. ``np.array`` of a literal counts as that literal;
    names with any other value are left out, and so is all of a source that is not Python.
    """
    functions = [node for node in _parsed(source).body if isinstance(node, ast.FunctionDef)]
    return _literals(functions[0]) if len(functions) == 1 else {}


def _parsed(source: str | None) -> ast.Module:
    """Return the syntax of a source; of a source that is not Python, that of nothing."""
    with warnings.catch_warnings(), contextlib.suppress(*_UNREADABLE):
        warnings.simplefilter("ignore")  # they would show lines of the source
        return ast.parse(source or "")
    return ast.Module(body=[], type_ignores=[])


def _literals(scope: ast.FunctionDef | ast.Module) -> dict[str, Any]:
    constants = {}
    for node in scope.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(*_UNREADABLE):
                constants[node.targets[0].id] = ast.literal_eval(_inside_array(node.value))
    return constants


def _inside_array(value: ast.expr) -> ast.expr:
    """Return ``[1, 2]`` for ``np.array([1, 2])``, as Dafne's own models write their sizes."""
    if not isinstance(value, ast.Call) or len(value.args) != 1 or value.keywords:
        return value
    array = ast.unparse(value.func) in ("np.array", "numpy.array")
    return value.args[0] if array else value


def model_labels(model: ModelFile) -> dict[int, str] | None:
    """Return label names by output channel, as far as the sources state them.

    They are either a literal ``LABELS_DICT`` or, as in Dafne's thigh and leg models, a table
    of ``dafne_dl.labels`` under that name; its file is parsed, not imported.
    """
    for key in ("apply_model_function", "incremental_learn_function"):
        if labels := source_labels(model.functions.get(key)):
            return labels
    return None


def source_labels(source: str | None) -> dict[int, str] | None:
    """Return the label names that one function states; see ``model_labels``."""
    labels = function_constants(source).get("LABELS_DICT") or _imported_labels(source)
    if not isinstance(labels, dict):
        return None
    named = all(type(k) is int and isinstance(name, str) for k, name in labels.items())
    if not named or any("\ud800" <= c <= "\udfff" for name in labels.values() for c in name):
        return None
    return labels


def _imported_labels(source: str | None) -> Any:
    for node in ast.walk(_parsed(source)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        package, _, table = node.module.rpartition(".labels.")
        wanted = [alias.name for alias in node.names if alias.asname == "LABELS_DICT"]
        if package == "dafne_dl" and table.isidentifier() and wanted:
            found = importlib.util.find_spec("dafne_dl")
            for folder in (found and found.submodule_search_locations) or ():
                path = Path(folder) / "labels" / f"{table}.py"
                if path.is_file():
                    return _literals(_parsed(path.read_text(encoding="utf-8"))).get(wanted[0])
    return None


def _kept(metadata: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        key: value
        for key, value in metadata.items()
        if key not in _TRANSIENT and not str(key).startswith("latest_")
    }


def _not_json(metadata: dict[Any, Any]) -> str:
    """Return why metadata cannot be written, in words; empty if it can."""
    for key in metadata:
        if not isinstance(key, str):
            return f"expected a text as key, got {type(key).__name__}"
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return ""


def _value(content: Mapping[Any, Any], key: str, kind: type[Plain], default: Plain) -> Plain:
    value = content.get(key)
    if value is None:
        return default
    if type(value) is not kind:
        msg = f"{key}: expected {kind.__name__}, got {type(value).__name__}"
        raise ModelFileError(msg)
    return value


def _weights(value: Any) -> tuple[Kind, Weights]:
    if value is None:
        return "none", {}
    if isinstance(value, Mapping):
        return "torch", {str(name): _array(name, array) for name, array in value.items()}
    if not isinstance(value, list):
        msg = f"weights: expected a list or dictionary of arrays, got {type(value).__name__}"
        raise ModelFileError(msg)
    if value and all(isinstance(member, Mapping) for member in value):
        return "ensemble", {
            f"{index}/{name}": _array(name, array)
            for index, member in enumerate(value)
            for name, array in member.items()
        }
    return "keras", keras_weights([_array(i, array) for i, array in enumerate(value)])


def _array(name: object, value: Any) -> npt.NDArray[np.generic]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        msg = f"weight {name!r}: expected an array of numbers, got {type(value).__name__}"
        raise ModelFileError(msg)
    return value


def size_mib(model: ModelFile) -> float:
    """Return the size of all weights in MiB."""
    return math.fsum(array.nbytes for array in model.weights.values()) / 2**20
