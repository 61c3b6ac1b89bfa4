"""Execute a Dafne model: the only place where the program text inside a `.model` runs.

Preprocessing, loss and the way back from the network's grid are constants and code inside the
base's own functions. They are not guessed: the functions run with a stand-in in place of the
network that only records what it is given.
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Never

import numpy as np
import numpy.typing as npt

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DafneFederatedError, DataError, ModelFileError
from dafne_federated.core.model_file import (
    ModelFile,
    model_labels,
    parse_model,
    source_labels,
    why_not_adaptable,
)
from dafne_federated.core.preprocessing import BiasFieldCache, fast_preprocessing
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.volumes import Case

Predict = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
Loss = Callable[[Any, Any], Any]

_LONGEST_REASON: Final = 300


class RunningModel:
    """A Dafne model whose code may run here: its network, its preprocessing, its loss.

    Args:
        file: The model.
        approvals: What this machine approved.

    Raises:
        ApprovalError: The model is not approved; nothing of it was executed.
        ModelFileError: Dafne cannot build it, or it is of a kind that cannot be adapted.
    """

    def __init__(self, file: ModelFile, approvals: Approvals) -> None:
        approvals.require(file)
        if reason := why_not_adaptable(file):
            msg = f"this model cannot be used here: {reason}"
            raise ModelFileError(msg)
        self.file = file
        self._object = _load(file)
        self.network = self._object.model
        self.loss: Loss | None = None
        self.labels = _label_names(file)
        channels = _output_channels(self.network) - 1
        if len(self.labels) != channels - 1:
            msg = f"expected {channels - 1} label names for {channels} channels, got {self.labels}"
            raise ModelFileError(msg)

    def prepare(
        self, case: Case, classification: str = "", cache: BiasFieldCache | None = None
    ) -> PreparedSlices | None:
        """Return the slices of ``case`` as the base's own training function prepares them.

        The function runs on this case alone, as Dafne does after one image was corrected by
        hand; so the weights of the loss depend on nothing but the case. It may leave slices
        out (Dafne's functions skip slices with too few labels).

        Args:
            case: Images and masks.
            classification: The class as Dafne names it, e.g. ``Thigh, Left``.
            cache: Keeps bias fields, which take most of the time.

        Returns:
            The slices, or None if the function keeps none of them.

        Raises:
            ModelFileError: The function fails, or does not train in the way that Dafne's own do.
            DataError: A slice of the case cannot be prepared.
        """
        recorder = _Recorder()
        usable = [i for i in range(case.image.shape[-1]) if np.ptp(case.image[..., i]) > 0]
        data = {
            "image_list": [case.image[..., i] for i in usable],
            "resolution": np.array(case.spacing[:2]),
            "classification": classification,
        }
        outputs = [
            {name: mask[..., i].astype(np.uint8) for name, mask in case.masks.items()}
            for i in usable
        ]
        with self._in_place(recorder, "training", case), fast_preprocessing(cache):
            self._object.incremental_learn_function(self._object, data, outputs, 1, 1)
        if recorder.slices is None:
            return None
        if recorder.slices.channels != len(self.labels) + 1:
            got = recorder.slices.channels
            msg = f"its training function gives {got} channels, expected {len(self.labels) + 1}"
            raise ModelFileError(msg)
        self.loss = self.loss or recorder.loss
        return recorder.slices

    def prepare_all(
        self, cases: Iterator[Case], classification: str = "", cache: BiasFieldCache | None = None
    ) -> PreparedSlices:
        """Return the slices of all cases in order; see ``prepare_each``."""
        return concatenate(self.prepare_each(cases, classification, cache))

    def prepare_each(
        self, cases: Iterator[Case], classification: str = "", cache: BiasFieldCache | None = None
    ) -> list[PreparedSlices]:
        """Return the slices of each case that has any.

        Raises:
            DataError: The training function keeps no slice of any case.
        """
        parts = [self.prepare(case, classification, cache) for case in cases]
        if not (kept := [part for part in parts if part is not None]):
            msg = (
                f"no slice of {len(parts)} cases can be trained on; Dafne leaves out slices "
                f"with fewer than half of the labels {list(self.labels)}"
            )
            raise DataError(msg)
        return kept

    def apply(
        self,
        case: Case,
        predict: Predict | None = None,
        classification: str = "",
        cache: BiasFieldCache | None = None,
    ) -> dict[str, npt.NDArray[np.bool_]]:
        """Return the model's masks for ``case``, (rows, columns, slices) by label name.

        Args:
            case: Its image and spacing are used.
            predict: Replaces the network, e.g. by an adapted one; takes and gives arrays
                (n, rows, columns, channels).
            classification: The class as Dafne names it.
            cache: Keeps bias fields.

        Raises:
            ModelFileError: The function fails, or returns something else than such masks.
            DataError: A slice of the case cannot be prepared.
        """
        masks = {name: np.zeros(case.image.shape, np.bool_) for name in self.labels}
        stand_in = _Predictor(predict or self._predict)
        with self._in_place(stand_in, "apply", case), fast_preprocessing(cache):
            for index in range(case.image.shape[-1]):
                image = case.image[..., index]
                if np.ptp(image) == 0:
                    continue
                found = self._object.apply_model_function(
                    self._object,
                    {
                        "image": image,
                        "resolution": np.array(case.spacing[:2]),
                        "split_laterality": False,
                        "classification": classification,
                    },
                )
                for name, mask in _checked_masks(found, self.labels, image.shape).items():
                    masks[name][..., index] = mask
        return masks

    def _predict(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(self.network.predict_on_batch(inputs.astype(np.float32)))

    @contextlib.contextmanager
    def _in_place(self, stand_in: object, function: str, case: Case) -> Iterator[None]:
        network, self._object.model = self._object.model, stand_in
        try:
            with _one_error(f"case {case.name!r}: the model's {function} function failed"):
                yield
        except DataError as error:
            msg = f"case {case.name!r}: {error}"
            raise DataError(msg) from None
        finally:
            self._object.model = network


def build_model(
    model_id: str,
    sources: Mapping[str, str],
    timestamp_id: int,
    metadata: Mapping[str, Any],
) -> ModelFile:
    """Return a new model of our own functions with random weights, complete as Dafne dumps it.

    Dafne itself builds it, so the file holds every function that Dafne adds. Random weights
    follow the seed set beforehand.
    """
    content = {
        "model_id": model_id,
        "timestamp_id": timestamp_id,
        "is_delta": False,
        "data_dimensionality": 2,
        "type": "DynamicDLModel",
        "metadata": dict(metadata),
        **sources,
    }
    return parse_model(_execute(content).dumps())


class _Predictor:
    """Stands in for the network while ``apply`` runs."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict

    def predict(self, inputs: npt.NDArray[Any], *_args: object, **_options: object) -> Any:
        return self._predict(np.asarray(inputs))

    __call__ = predict


class _Recorder:
    """Stands in for the network while ``incremental_learn`` runs; records loss and slices."""

    layers: tuple[object, ...] = ()
    trainable = True

    def __init__(self) -> None:
        self.loss: Loss | None = None
        self.slices: PreparedSlices | None = None

    def compile(self, *_args: object, loss: Any = None, **_options: object) -> None:
        self.loss = loss

    def fit(self, x: Any = None, *_args: object, **_options: object) -> None:
        prepared = getattr(x, "training_data_list", None)
        if not callable(self.loss) or not isinstance(prepared, list) or not prepared:
            msg = (
                "its training function does not compile a loss and fit on a list of prepared "
                "slices, as the functions of Dafne's own models do"
            )
            raise ModelFileError(msg)
        arrays = np.asarray(prepared)
        marked = arrays[..., 1:-1]
        if not np.array_equal(marked.sum(axis=-1), np.ones(arrays.shape[:-1])):
            msg = "its training function does not give each pixel one label"
            raise ModelFileError(msg)
        self.slices = PreparedSlices(
            images=arrays[..., 0].astype(np.float32),
            labels=marked.argmax(axis=-1).astype(np.uint8),
            weights=arrays[..., -1].astype(np.float32),
            channels=marked.shape[-1],
        )

    def __getattr__(self, name: str) -> Never:
        msg = f"its training function uses {name!r} of the network, which is not known here"
        raise ModelFileError(msg)


def _load(file: ModelFile) -> Any:
    content = {
        "model_id": file.model_id,
        "weights": [file.weights[key] for key in sorted(file.weights)],
        "timestamp_id": file.timestamp_id,
        "is_delta": file.is_delta,
        "data_dimensionality": file.dimensionality,
        "type": file.type,
        "metadata": dict(file.metadata),
        **file.functions,
    }
    return _execute(content)


def _execute(content: dict[str, Any]) -> Any:
    _check_imports()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, _one_error("Dafne cannot build this model"):
        from dafne_dl.model_loaders import generic_load_model

        return generic_load_model(content, install_deps=False)


@contextlib.contextmanager
def _one_error(failure: str) -> Iterator[None]:
    """Turn whatever a model's own code raises in the block, an exit too, into one line."""
    try:
        yield
    except DafneFederatedError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        msg = f"{failure}: {type(error).__name__}: {reason}"
        raise ModelFileError(msg) from error


def _output_channels(network: Any) -> int:
    shape = getattr(network, "output_shape", None)
    if not isinstance(shape, tuple) or not shape or not isinstance(shape[-1], int):
        got = f"a {type(network).__name__} with output shape {shape}"
        msg = f"expected a Keras network with one output of known channels, got {got}"
        raise ModelFileError(msg)
    return shape[-1]


def _checked_masks(
    found: Any, labels: Sequence[str], shape: tuple[int, ...]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return what an apply function returned for one slice, as masks (rows, columns) bool."""
    if not isinstance(found, Mapping):
        msg = f"the model returned a {type(found).__name__}, expected masks by label name"
        raise ModelFileError(msg)
    masks = {}
    for name, mask in found.items():
        if name not in labels:
            msg = f"the model returned an unknown label {name!r}"
            raise ModelFileError(msg)
        masks[name] = np.asarray(mask) > 0
        if masks[name].shape != shape:
            got = f"expected {shape}, got {masks[name].shape}"
            msg = f"the model returned a mask of another size for {name!r}: {got}"
            raise ModelFileError(msg)
    return masks


def _check_imports() -> None:
    """Keep the import of ``dafne_dl`` from installing packages or failing on a folder."""
    if importlib.util.find_spec("SimpleITK") is None:
        msg = "SimpleITK is missing; install it with 'pip install SimpleITK-SimpleElastix'"
        raise ModelFileError(msg)
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    nearest = next(p for p in (settings, *settings.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="dafne-federated-")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _label_names(file: ModelFile) -> tuple[str, ...]:
    labels = model_labels(file)
    if not labels or sorted(labels) != list(range(1, len(labels) + 1)):
        msg = f"expected label names for channels 1, 2, ... in the model's sources, got {labels}"
        raise ModelFileError(msg)
    if len(set(labels.values())) != len(labels):
        msg = f"expected a name of its own for each label in the model's sources, got {labels}"
        raise ModelFileError(msg)
    learned = source_labels(file.functions["incremental_learn_function"])
    if learned is not None and learned != labels:
        msg = f"its training function has other labels than its apply function: {learned}, {labels}"
        raise ModelFileError(msg)
    return tuple(labels[channel] for channel in sorted(labels))
