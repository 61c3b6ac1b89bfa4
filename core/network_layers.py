"""What the layers of a Keras network are, and how each computes with changed weights."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from dafne_federated.core.plan import Layer

Tensor = Any
Kernel = Callable[[keras.layers.Layer, Tensor, Tensor], Tensor]


def describe_layers(network: keras.Model) -> list[Layer]:
    """Return the layers of ``network`` that have weights, in the order of the weight keys."""
    keys = {id(variable): f"{index:04d}" for index, variable in enumerate(network.weights)}
    layers: list[Layer] = []
    decoder = False
    for layer in leaf_layers(network):
        if not layer.weights:
            continue
        kind = _kind(layer)
        decoder = decoder or kind == "conv-transpose"
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
    """Return the trained weights of ``layer`` by role: kernel and bias, or gamma and beta."""
    names = ("kernel", "bias", "gamma", "beta")
    return {v.name: v for v in layer.weights if v.name in names}


def convolve(layer: keras.layers.Layer, inputs: Tensor, kernel: Tensor) -> Tensor:
    """Return what ``layer`` computes before bias and activation, with another kernel.

    Stride, padding and dilation are the layer's own; only the channel counts may differ.
    """
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


def normalise(layer: keras.layers.Layer, inputs: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return what a batch normalisation computes from its stored statistics."""
    return ops.batch_normalization(
        x=inputs,
        mean=ops.convert_to_tensor(layer.moving_mean),
        variance=ops.convert_to_tensor(layer.moving_variance),
        axis=layer.axis,
        offset=weights.get("beta"),
        scale=weights.get("gamma"),
        epsilon=layer.epsilon,
    )


def _kind(layer: keras.layers.Layer) -> Any:
    transposed = (
        keras.layers.Conv1DTranspose,
        keras.layers.Conv2DTranspose,
        keras.layers.Conv3DTranspose,
    )
    if isinstance(layer, transposed):
        return "conv-transpose"
    # Exact classes: a subclass (separable, depthwise, or somebody's own) computes otherwise.
    if type(layer) in (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D):
        return "conv"
    if type(layer) is keras.layers.Dense:
        return "dense"
    if type(layer) is keras.layers.BatchNormalization:
        return "norm"
    return "other"


def _refusal(layer: keras.layers.Layer, kind: str) -> str:
    if kind == "other":
        return f"layers of kind {type(layer).__name__} compute in a way of their own"
    if getattr(layer, "groups", 1) != 1:
        return "grouped convolutions have no useful low rank per group"
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "channels must come last"
    return ""
