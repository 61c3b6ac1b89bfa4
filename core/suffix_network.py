"""The part of a network that a plan changes, cut off from the part that stays as it is.

Everything that does not depend on a trained weight is the prefix. Its outputs that the rest
reads (the bottom level, skip connections, the weight map) are the features of a slice: they
are computed once. Only the rest, the suffix, is run and trained; it holds the same variables
as the adapted network that it was cut from, so training one is training the other.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from dafne_federated.core.adapters import AdaptedNetwork, positive
from dafne_federated.core.errors import AdapterError
from dafne_federated.core.files import arrays_digest, sha256
from dafne_federated.core.folded_layers import convolutions, fold_convolution
from dafne_federated.core.network_graph import Step, needed, read_graph, run_steps
from dafne_federated.core.network_layers import Precision, Tensor, leaf_layers
from dafne_federated.core.plan import Target

Features = list[npt.NDArray[np.float32]]


class SuffixNetwork:
    """The suffix of an adapted network; both share their variables.

    Args:
        adapted: The network with its plan.
        saved: Whether to cut it where the first trained layer lies.
        precision: Of the suffix's convolutions that have their normalisation folded in: not of
            the head, nor of kernels that are trained whole. All the rest is float32: features,
            trained variables, sums, probabilities and the weight map.

    Attributes:
        trained: The suffix as a model; its input is a list of features.
        shapes: Shapes of the features of one slice.
        saved: Whether there is a prefix with weights, so that keeping features saves work. If
            not, the whole network is the suffix, and its input takes the place of features.
        weights_digest: Digest of the base weights, which must not change any more.
        statistics: ``AdaptedNetwork.statistics`` when it was cut; they are part of the prefix
            and are folded into convolutions, so another number means that it is out of date.

    Raises:
        AdapterError: The network is not a graph of layers.
    """

    def __init__(
        self, adapted: AdaptedNetwork, saved: bool = True, precision: Precision = "float32"
    ) -> None:
        self.plan = adapted.plan
        self.weights_digest = _digest(adapted.network)
        self.statistics = adapted.statistics
        cut = _cut(adapted, saved, precision)
        self.trained = _Suffix(cut, adapted)
        self.shapes = cut.shapes
        self.saved = bool(cut.prefix)
        self._prefix = _Prefix(cut)

    @property
    def slice_bytes(self) -> int:
        """Bytes of the features of one slice, float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes)

    def features(self, inputs: npt.NDArray[np.float32]) -> Features:
        """Return the features of network inputs (n, rows, columns, 2), float32, n first each."""
        made = self._prefix.predict_on_batch(inputs) if self.saved else [inputs]
        return [np.asarray(feature, np.float32) for feature in made]


def without_skips(network: keras.Model, targets: Iterable[Target]) -> tuple[Target, ...]:
    """Return ``targets`` with low-rank pairs that cover no frozen input channels.

    Where a convolution reads a frozen skip connection and a trained tensor side by side, the
    pair then changes its kernel for the trained tensor alone. What comes from the skip
    connection is constant, so with a cache it costs nothing, and the pair has fewer values. A
    network that is not a graph of layers has no skip connections to be seen; its targets stay.

    Args:
        network: The base network.
        targets: What a plan trains on it.
    """
    targets = tuple(targets)
    try:
        graph = read_graph(network)
    except AdapterError:
        return targets
    by_layer = _targets_by_layer(network, targets)
    varying = graph.varying(by_layer)
    narrowed = {}
    for found in convolutions(graph, by_layer):
        channels = found.varying_channels(varying)
        if found.target and channels:
            narrowed[found.target.key] = found.target.model_copy(update={"inputs": channels})
    return tuple(narrowed.get(target.key, target) for target in targets)


@dataclass(frozen=True)
class _Cut:
    """A network in two parts.

    Attributes:
        input: The tensor that the network is given.
        prefix: Steps that never change.
        border: The tensors between the parts.
        shapes: Their shapes without the batch.
        suffix: The other steps.
        output: The tensor that the network returns.
    """

    input: int
    prefix: tuple[Step, ...]
    border: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    suffix: tuple[Step, ...]
    output: int


class _Suffix(keras.Model):  # type: ignore[misc]
    def __init__(self, cut: _Cut, adapted: AdaptedNetwork) -> None:
        super().__init__(name="suffix")
        self._cut = cut
        self.changes = dict(adapted.trained.changes)
        self.built = True

    def call(self, features: Sequence[Tensor] | Tensor, training: bool = False) -> Tensor:
        values = features if isinstance(features, (list, tuple)) else [features]
        known = dict(zip(self._cut.border, values, strict=True))
        return positive(run_steps(self._cut.suffix, known)[self._cut.output])


class _Prefix(keras.Model):  # type: ignore[misc]
    def __init__(self, cut: _Cut) -> None:
        super().__init__(name="prefix")
        self._cut = cut
        self.built = True

    def call(self, inputs: Tensor, training: bool = False) -> list[Tensor]:
        known = run_steps(self._cut.prefix, {self._cut.input: inputs})
        return [ops.convert_to_tensor(known[number]) for number in self._cut.border]


def _cut(adapted: AdaptedNetwork, saved: bool, precision: Precision) -> _Cut:
    graph = read_graph(adapted.network)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        msg = f"expected a network with one input and one output, got {adapted.network.name!r}"
        raise AdapterError(msg)
    targets = _targets_by_layer(adapted.network, adapted.plan.targets)
    varying = graph.varying(targets)
    foldable = {id(found.step): found for found in convolutions(graph, targets)}
    frozen = [step for step in graph.steps if varying.isdisjoint(step.outputs)]
    saved = saved and any(getattr(step.layer, "weights", ()) for step in frozen)
    shapes = list(graph.shapes)
    prefix: list[Step] = []
    suffix: list[Step] = []
    made: set[int] = set()
    for step in graph.steps:
        found = foldable.get(id(step))
        constant = found.constant_parts(varying) if found and saved else ()
        if saved and varying.isdisjoint(step.outputs):
            prefix.append(step)
        elif found and (found.norm or constant):
            changes, scale = adapted.trained.changes, adapted.plan.scale
            new = len(shapes)
            *sums, rest = fold_convolution(found, constant, changes, scale, new, precision)
            prefix += sums
            shapes += [graph.shapes[found.output]] * len(sums)
            suffix.append(rest)
            made.add(found.output)
        elif made.isdisjoint(step.outputs):  # else a normalisation that was folded
            suffix.append(step)
    suffix, border = needed(suffix, graph.outputs)
    prefix, _ = needed(prefix, border)
    sizes = tuple(_without_batch(shapes[number]) for number in border)
    return _Cut(graph.inputs[0], tuple(prefix), border, sizes, tuple(suffix), graph.outputs[0])


def _targets_by_layer(
    network: keras.Model, targets: Iterable[Target]
) -> dict[int, dict[str, Target]]:
    """Return what is trained by ``id`` of the layer and name of the weight."""
    by_key = {target.key: target for target in targets if target.trained}
    keys = {id(variable): f"{index:04d}" for index, variable in enumerate(network.weights)}
    found: dict[int, dict[str, Target]] = {}
    for layer in leaf_layers(network):
        for variable in layer.weights:
            if target := by_key.get(keys[id(variable)]):
                found.setdefault(id(layer), {})[variable.name] = target
    return found


def _digest(network: keras.Model) -> str:
    """Return a digest of all weights, which never stand in memory twice for it."""
    parts = [arrays_digest({"": ops.convert_to_numpy(v)}) for v in network.weights]
    return sha256("".join(parts).encode())


def _without_batch(shape: Sequence[int | None]) -> tuple[int, ...]:
    if None in shape[1:]:
        msg = f"expected a network of fixed size, got a level of shape {tuple(shape)}"
        raise AdapterError(msg)
    return tuple(size for size in shape[1:] if size is not None)
