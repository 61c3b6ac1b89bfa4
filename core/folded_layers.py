"""Convolutions of a frozen network with all that is constant around them folded in.

A normalisation in inference mode that follows a convolution is one factor and one shift for
each output channel, so it goes into kernel and bias. Where a convolution reads frozen and
trained tensors side by side (a skip connection and the way up), it is a sum,
``conv(concat(skip, up)) = conv(skip) + conv(up)``, and the first term never changes. In the
first trained layer all inputs are frozen, and only what its change adds is left to compute.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from dafne_federated.core.low_rank_layers import low_rank_call, low_rank_change
from dafne_federated.core.network_graph import Graph, Step
from dafne_federated.core.network_layers import Precision, Tensor, convolve, roles
from dafne_federated.core.plan import Target

Changes = Mapping[str, keras.Variable]
Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Convolution:
    """A use of a convolution that can be folded.

    Attributes:
        step: The use.
        target: The low-rank change of its kernel, if there is one.
        norm: The normalisation that alone reads its output, if that is frozen.
        parts: The tensors that it reads side by side, each with its first input channel and
            one past its last.
    """

    step: Step
    target: Target | None
    norm: Step | None
    parts: tuple[tuple[int, int, int], ...]

    @property
    def output(self) -> int:
        """Number of the tensor that comes out behind the normalisation."""
        return (self.norm or self.step).outputs[0]

    def varying_channels(self, varying: Container[int]) -> tuple[int, int] | None:
        """Return the input channels that change, if others do not and they lie together."""
        changing = [part for part in self.parts if part[0] in varying]
        if not changing or len(changing) == len(self.parts):
            return None
        first, end = changing[0][1], changing[-1][2]
        gapless = sum(end - first for _, first, end in changing) == end - first
        return (first, end) if gapless else None

    def constant_parts(self, varying: Container[int]) -> tuple[int, ...]:
        """Return which of its tensors go through the frozen kernel alone and never change."""
        constant = tuple(tensor for tensor, *_ in self.parts if tensor not in varying)
        if len(constant) == len(self.parts):
            return constant
        channels = self.varying_channels(varying)
        alone = self.target is None or self.target.inputs == channels
        return constant if channels and alone else ()


def convolutions(graph: Graph, targets: Mapping[int, Mapping[str, Target]]) -> list[Convolution]:
    """Return the uses of convolutions that can be folded.

    Args:
        graph: The network.
        targets: Planned changes by ``id`` of the layer and role.
    """
    makers = {tensor: step for step in graph.steps for tensor in step.outputs}
    readers: dict[int, list[Step | None]] = {tensor: [None] for tensor in graph.outputs}
    for step in graph.steps:
        for tensor in step.inputs:
            readers.setdefault(tensor, []).append(step)
    found = []
    for step in graph.steps:
        planned = targets.get(id(step.layer), {})
        if not _is_plain(step) or any(not target.low_rank for target in planned.values()):
            continue
        follower = readers[step.outputs[0]]
        norm = follower[0] if len(follower) == 1 else None
        if norm and not (_is_linear(step) and _is_frozen_norm(norm, graph, targets)):
            norm = None
        maker = makers.get(step.inputs[0])
        together = maker.inputs if maker and _joins_channels(maker, graph) else step.inputs
        ends = np.cumsum([graph.shapes[tensor][-1] for tensor in together]).tolist()
        parts = tuple(zip(together, [0, *ends], ends, strict=False))
        found.append(Convolution(step, planned.get("kernel"), norm, parts))
    return found


def fold_convolution(
    found: Convolution,
    constant: Sequence[int],
    changes: Changes,
    scale: float,
    new: int,
    precision: Precision = "float32",
) -> list[Step]:
    """Return steps that compute a convolution and its normalisation with fewer operations.

    Args:
        found: The convolution.
        constant: Those of its tensors that never change; without any there is one step only.
        changes: Variables of the adapters by state key.
        scale: The scale of the plan.
        new: Number for the tensor that the constant ones add up to.
        precision: Of the convolution; what is constant is computed once, in float32.

    Returns:
        The step for the constant tensors, which makes ``new``, if there are any; then the step
        that computes the rest.
    """
    layer, target = found.step.layer, found.target
    gain, shift = (ops.convert_to_tensor(row) for row in _gain_and_shift(found))
    rest = [tensor for tensor, *_ in found.parts if tensor not in constant]
    read = rest or [tensor for tensor, *_ in found.parts]
    last = layer.activation if found.norm is None else None

    def sum_up(values: Sequence[Tensor]) -> list[Tensor]:
        return [convolve(layer, _side_by_side(values), _kernel(found, constant, gain))]

    def compute(values: Sequence[Tensor]) -> list[Tensor]:
        inputs = _side_by_side(values[: len(read)])
        summands = [shift, *values[len(read) :]]
        # Folded anew in each step: it costs little, and copies of all kernels would stay.
        kernel = _kernel(found, rest, gain)
        if target is None:
            outputs = convolve(layer, inputs, kernel, precision)
        else:
            a, b = scale * changes[f"{target.key}/a"], changes[f"{target.key}/b"] * gain
            if rest:
                outputs = low_rank_call(layer, target, inputs, kernel, a, b, summands, precision)
                summands = []
            else:
                covered = slice(*(target.inputs or (None, None)))
                outputs = low_rank_change(layer, target, inputs[..., covered], a, b, precision)
        for summand in summands:
            outputs = ops.add(outputs, summand)
        return [outputs if last is None else last(outputs)]

    if not constant:
        return [Step(layer, tuple(read), (found.output,), compute)]
    return [
        Step(layer, tuple(constant), (new,), sum_up),
        Step(layer, (*read, new), (found.output,), compute),
    ]


def _side_by_side(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else ops.concatenate(values, axis=-1)


def _is_plain(step: Step) -> bool:
    plain: tuple[type[keras.layers.Layer], ...] = (
        *(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense),
        *(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose),
        keras.layers.Conv3DTranspose,
    )
    layer = step.layer
    return (
        type(layer) in plain
        and getattr(layer, "groups", 1) == 1
        and getattr(layer, "data_format", "channels_last") == "channels_last"
    )


def _is_linear(step: Step) -> bool:
    return step.layer.activation in (None, keras.activations.linear)


def _is_frozen_norm(step: Step, graph: Graph, targets: Mapping[int, Mapping[str, Target]]) -> bool:
    layer = step.layer
    if type(layer) is not keras.layers.BatchNormalization or id(layer) in targets:
        return False
    return layer.axis in (-1, len(graph.shapes[step.inputs[0]]) - 1)


def _joins_channels(step: Step, graph: Graph) -> bool:
    if type(step.layer) is not keras.layers.Concatenate:
        return False
    return step.layer.axis in (-1, len(graph.shapes[step.outputs[0]]) - 1)


def _kernel(found: Convolution, tensors: Sequence[int], gain: Tensor) -> Tensor:
    """Return the kernel for the input channels of ``tensors``, times ``gain``."""
    kernel = ops.convert_to_tensor(roles(found.step.layer)["kernel"])
    transposed = _is_transposed(found.step.layer)
    chosen = [slice(*ends) for tensor, *ends in found.parts if tensor in tensors]
    if 0 < len(chosen) < len(found.parts):
        parts = [kernel[..., ends] if transposed else kernel[..., ends, :] for ends in chosen]
        kernel = ops.concatenate(parts, axis=-1 if transposed else -2)
    return kernel * (gain[:, None] if transposed else gain)


def _gain_and_shift(found: Convolution) -> tuple[Row, Row]:
    """Return the factor of each output channel and what is added to it, float32."""
    layer = found.step.layer
    outputs = roles(layer)["kernel"].shape[-2 if _is_transposed(layer) else -1]
    gain, shift = np.ones(outputs), np.zeros(outputs)
    if layer.use_bias:
        shift = _numbers(layer.bias)
    if found.norm:
        norm = found.norm.layer
        gain = 1 / np.sqrt(_numbers(norm.moving_variance) + norm.epsilon)
        if norm.scale:
            gain = gain * _numbers(norm.gamma)
        shift = (shift - _numbers(norm.moving_mean)) * gain
        if norm.center:
            shift = shift + _numbers(norm.beta)
    return gain.astype(np.float32), shift.astype(np.float32)


def _numbers(variable: keras.Variable) -> npt.NDArray[np.float64]:
    return np.asarray(ops.convert_to_numpy(variable), np.float64)


def _is_transposed(layer: keras.layers.Layer) -> bool:
    return "Transpose" in type(layer).__name__
