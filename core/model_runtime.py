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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Never

import numpy as np
import numpy.typing as npt

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DataError, ModelFileError
from dafne_federated.core.model_file import (
    ModelFile,
    model_labels,
    parse_model,
    why_not_adaptable,
)
from dafne_federated.core.preprocessing import BiasFieldCache, fast_preprocessing
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.volumes import Case

Predict = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
Loss = Callable[[Any, Any], Any]


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
        channels = int(self.network.output_shape[-1]) - 1
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
            ModelFileError: The function does not train in the way that Dafne's own do.
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
        with self._in_place(recorder), fast_preprocessing(cache):
            self._object.incremental_learn_function(self._object, data, outputs, 1, 1)
        if recorder.slices is None:
            return None
        self.loss = self.loss or recorder.loss
        return recorder.slices

    def prepare_all(
        self, cases: Iterator[Case], classification: str = "", cache: BiasFieldCache | None = None
    ) -> PreparedSlices:
        """Return the slices of all cases in order.

        Raises:
            DataError: The training function keeps no slice of any case.
        """
        parts = [self.prepare(case, classification, cache) for case in cases]
        kept = [part for part in parts if part is not None]
        if not kept:
            msg = (
                f"no slice of {len(parts)} cases can be trained on; Dafne leaves out slices "
                f"with fewer than half of the labels {list(self.labels)}"
            )
            raise DataError(msg)
        return concatenate(kept)

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
        """
        masks = {name: np.zeros(case.image.shape, np.bool_) for name in self.labels}
        stand_in = _Predictor(predict or self._predict)
        with self._in_place(stand_in), fast_preprocessing(cache):
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
                for name, mask in found.items():
                    if name not in masks:
                        msg = f"the model returned an unknown label {name!r}"
                        raise ModelFileError(msg)
                    masks[name][..., index] = np.asarray(mask) > 0
        return masks

    def _predict(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(self.network.predict_on_batch(inputs.astype(np.float32)))

    @contextlib.contextmanager
    def _in_place(self, stand_in: object) -> Iterator[None]:
        network, self._object.model = self._object.model, stand_in
        try:
            yield
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
    try:
        with _quiet():
            from dafne_dl.model_loaders import generic_load_model

            return generic_load_model(content, install_deps=False)
    except Exception as error:  # the model's own code can raise anything
        msg = f"Dafne cannot build this model: {type(error).__name__}: {error}"
        raise ModelFileError(msg) from error


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
    return tuple(labels[channel] for channel in sorted(labels))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
