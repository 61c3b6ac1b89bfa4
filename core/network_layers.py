"""What the layers of a Keras network are, and how each computes with changed weights."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import keras
from keras import ops

from dafne_federated.core.plan import Layer

Tensor = Any
Precision = Literal["float32", "bfloat16"]
_UPSAMPLING = (
    keras.layers.UpSampling1D,
    keras.layers.UpSampling2D,
    keras.layers.UpSampling3D,
)


def describe_layers(network: keras.Model) -> list[Layer]:
    """Return the layers of ``network`` that have weights, in the order of the weight keys."""
    keys = {id(variable): f"{index:04d}" for index, variable in enumerate(network.weights)}
    layers: list[Layer] = []
    decoder = False
    for layer in leaf_layers(network):
        kind = _kind(layer)
        decoder = decoder or kind == "conv-transpose" or isinstance(layer, _UPSAMPLING)
        if not layer.weights:
            continue
        weights = {
            role: (keys[id(variable)], tuple(variable.shape))
            for role, variable in roles(layer).items()
        }
        layers.append(
            Layer(
                name=layer.name,
                kind=kind,
                weights=weights,
                depth=len(layers),
                decoder=decoder,
                refused=_refusal(layer, kind),
                work=_work(layer, kind),
            )
        )
    return layers


def leaf_layers(network: keras.Model) -> list[keras.layers.Layer]:
    """Return all layers, those of nested models included, in the order of the weights."""
    leaves = []
    for layer in network.layers:
        leaves += leaf_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return leaves


def roles(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Return the weights of ``layer`` that training may change, by role.

    Kernel, bias, gamma and beta always, also where somebody froze them; of other weights those
    that are not frozen, by their own names. Stored statistics are never among them.
    """
    found: dict[str, keras.Variable] = {}
    for variable in layer.weights:
        if variable.name in ("kernel", "bias", "gamma", "beta") or variable.trainable:
            number = sum(role.split(" ")[0] == variable.name for role in found) + 1
            found[variable.name if number == 1 else f"{variable.name} {number}"] = variable
    return found


def convolve(
    layer: keras.layers.Layer, inputs: Tensor, kernel: Tensor, precision: Precision = "float32"
) -> Tensor:
    """Return what ``layer`` computes before bias and activation, with another kernel.

    Stride, padding and dilation are the layer's own; only the channel counts may differ. With
    ``bfloat16`` the products are of numbers with 8 significant bits, which some processors
    compute twice as fast; what goes in and what comes out is float32.
    """
    if precision != "float32":
        inputs, kernel = ops.cast(inputs, precision), ops.cast(kernel, precision)
        return ops.cast(convolve(layer, inputs, kernel), "float32")
    if isinstance(layer, keras.layers.Dense):
        return ops.matmul(inputs, kernel)
    geometry = {
        "strides": list(layer.strides),
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
        "data_format": layer.data_format,
    }
    if _kind(layer) == "conv-transpose":
        padding = layer.output_padding
        return ops.conv_transpose(inputs, kernel, output_padding=padding, **geometry)
    return ops.conv(inputs, kernel, **geometry)


def finish(layer: keras.layers.Layer, outputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Add the bias and apply the activation of ``layer``."""
    if layer.use_bias:
        outputs = ops.add(outputs, weights["bias"])
    return outputs if layer.activation is None else layer.activation(outputs)


def _kind(layer: keras.layers.Layer) -> Any:
    transposed = (
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    )
    if isinstance(layer, transposed):
        return "conv-transpose"
    # Exact classes: a subclass (separable, or somebody's own) computes otherwise.
    if type(layer) in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D):
        return "conv"
    if type(layer) in (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D):
        return "depthwise"
    if type(layer) is keras.layers.Dense:
        return "dense"
    if type(layer) is keras.layers.BatchNormalization:
        return "norm"
    return "other"


def _refusal(layer: keras.layers.Layer, kind: str) -> str:
    if kind in ("depthwise", "norm", "other"):
        return f"layers of kind {type(layer).__name__} compute in a way of their own"
    if getattr(layer, "groups", 1) != 1:
        return "grouped convolutions have no useful low rank per group"
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "channels must come last"
    return ""


def _work(layer: keras.layers.Layer, kind: str) -> int:
    """Return the multiply-adds of the kernel for one input: its size at each position.

    Positions are those of the output, of the input for a transposed convolution. A layer that
    is used more than once counts once.
    """
    kernel = roles(layer).get("kernel")
    if kernel is None or kind == "other":
        return 0
    try:
        shape = (layer.input if kind == "conv-transpose" else layer.output).shape
    except AttributeError:  # built outside a graph of layers
        return 0
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    positions = shape[2:] if first else shape[1:-1]
    return 0 if None in positions else math.prod(positions) * math.prod(kernel.shape)
