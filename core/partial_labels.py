"""The base's loss where some of its labels were not annotated: neither learned nor denied.

Where nobody looked for a label, what is marked as background is background *or* that label. Its
probability is the sum of both, and the base's own loss is given that sum in place of the
probability of background. So moving probability between background and a missing label changes
nothing, while every annotated label is learned as ever.

Source:
    The marginal loss of Shi et al. 2021, Medical Image Analysis 70:101979,
    https://arxiv.org/abs/2007.03868.
"""

from collections.abc import Sequence

import numpy as np
from keras import ops

from dafne_federated.core.adapters import TINY
from dafne_federated.core.loss_parts import Loss, loss_in_parts
from dafne_federated.core.network_layers import Tensor


def marginal_loss(loss: Loss, channels: int, missing: Sequence[int]) -> Loss:
    """Return ``loss`` of an output whose missing labels are merged with background.

    The channel of a missing label gets the constant that stands for a probability of zero
    (``adapters.TINY``): the logarithm of it is finite, no target points to it, and it has no
    gradient. All other channels and the weight map come through bit for bit.

    Args:
        loss: The base's own; called with one-hot targets and the network's output.
        channels: Channels of the targets, background included; the output has one more.
        missing: Channels of the labels that were not annotated; none gives ``loss`` itself.
    """
    if not missing:
        return loss
    in_parts = loss_in_parts(loss, channels)
    absent = np.zeros(channels + 1, np.float32)
    absent[list(missing)] = 1
    background = np.eye(1, channels + 1, dtype=np.float32)[0]

    def merged(truth: Tensor, output: Tensor) -> Tensor:
        if not ops.is_tensor(output):  # cut into parts by the caller, which is done here already
            msg = "expected a tensor"
            raise TypeError(msg)
        gone, first, tiny, stays = map(
            ops.convert_to_tensor, (absent, background, TINY * absent, 1 - absent)
        )
        # Products and one sum instead of a matrix product, which a GPU may round to ten bits.
        hidden = ops.sum(output * gone, axis=-1, keepdims=True)
        return in_parts(truth, output * stays + tiny + first * hidden)

    return merged
