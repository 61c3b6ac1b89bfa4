"""A layer whose kernel has a low-rank change: one kernel forward, two small ones backward.

The forward pass uses one kernel, ``W + a b``, exactly as the folded model will. Backward, the
gradient of ``a`` and ``b`` needs only ``z = conv(x, a)``, which has ``rank`` channels, so the
gradient of the full kernel is never formed:

    y = conv(x, W + a b),   d b = z^T d y,   d z = d y b^T,   d a from d z through conv(x, a)

The gradient towards ``x`` passes through the merged kernel.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from dafne_federated.core.network_layers import Precision, Tensor, convolve
from dafne_federated.core.plan import Target

# Up to so many output channels the gradient of the full kernel costs no more time than the
# detour through z. Measured at 250 x 250 on a CPU with AVX-512, which computes 16 channels at
# once: 45 ms against 60 ms at 32 channels, 55 ms against 42 ms at 64.
_FEW_CHANNELS = 32


def low_rank_call(
    layer: keras.layers.Layer,
    target: Target,
    inputs: Tensor,
    kernel: Tensor,
    a: Tensor,
    b: Tensor,
    summands: Sequence[Tensor] = (),
    precision: Precision = "float32",
) -> Tensor:
    """Return what ``layer`` computes before bias and activation with kernel ``kernel + a b``.

    Args:
        layer: A convolution, a transposed convolution or a dense layer.
        target: The planned change of its kernel.
        inputs: All input channels, or those alone that the target covers.
        kernel: The frozen kernel for these inputs.
        a: First factor; the scale of the plan is in one of the two.
        b: Second factor.
        summands: What is added to the outputs; here, so that it joins the convolution.
        precision: Of the convolutions; kernels are merged and outputs added in float32.
    """
    update = _kernel_update(target, a, b)
    covered = inputs
    if target.inputs and kernel.shape != update.shape:
        update = ops.pad(update, target.padding())
        covered = inputs[..., target.inputs[0] : target.inputs[1]]
    transposed = target.kind == "conv-transpose"
    few = not transposed and target.shape[-1] <= _FEW_CHANNELS
    merged = kernel + update if few else ops.stop_gradient(kernel + update)
    outputs = convolve(layer, inputs, merged, precision)
    for summand in summands:
        outputs = ops.add(outputs, summand)
    if few:
        return outputs
    covered = ops.stop_gradient(covered)
    if transposed:
        return _first(outputs, low_rank_change(layer, target, covered, a, b, precision))
    return _with_pair(outputs, convolve(layer, covered, a, precision), b)


def low_rank_change(
    layer: keras.layers.Layer,
    target: Target,
    inputs: Tensor,
    a: Tensor,
    b: Tensor,
    precision: Precision = "float32",
) -> Tensor:
    """Return what the change ``a b`` of the kernel adds to the outputs of ``layer``.

    Args:
        layer: As for ``low_rank_call``.
        target: The planned change of its kernel.
        inputs: The input channels that the target covers.
        a: First factor.
        b: Second factor.
        precision: As for ``low_rank_call``.
    """
    if target.kind == "conv-transpose":
        return convolve(layer, ops.matmul(inputs, a), ops.moveaxis(b, 0, -1), precision)
    return ops.matmul(convolve(layer, inputs, a, precision), b)


@ops.custom_gradient  # type: ignore[untyped-decorator]
def _with_pair(outputs: Tensor, z: Tensor, b: Tensor) -> Any:
    """Return ``outputs``, which ``z @ b`` is a part of, with the gradients of ``z`` and ``b``."""

    def gradients(*arguments: Tensor, upstream: Tensor = None) -> tuple[Tensor, ...]:
        arriving = arguments[0] if upstream is None else upstream
        flat = ops.reshape(arriving, (-1, b.shape[-1]))
        of_z = ops.reshape(ops.matmul(flat, ops.transpose(b)), ops.shape(z))
        of_b = ops.matmul(ops.transpose(ops.reshape(z, (-1, b.shape[0]))), flat)
        return arriving, of_z, of_b

    return outputs, gradients


@ops.custom_gradient  # type: ignore[untyped-decorator]
def _first(outputs: Tensor, part: Tensor) -> Any:
    """Return ``outputs``, which ``part`` is a part of, with the gradients of both."""

    def gradients(*arguments: Tensor, upstream: Tensor = None) -> tuple[Tensor, ...]:
        arriving = arguments[0] if upstream is None else upstream
        return arriving, arriving

    return outputs, gradients


def _kernel_update(target: Target, a: Tensor, b: Tensor) -> Tensor:
    rank = a.shape[-1]
    product = ops.matmul(ops.reshape(a, (-1, rank)), ops.reshape(b, (rank, -1)))
    if target.kind == "conv-transpose":
        *window, cout, cin = target.covered
        return ops.moveaxis(ops.reshape(product, (cin, *window, cout)), 0, -1)
    return ops.reshape(product, target.covered)
