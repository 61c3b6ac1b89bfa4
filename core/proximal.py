"""Adam that holds trained arrays to where a round began: the proximal term of FedProx.

The sites minimise their loss plus ``mu / 2 * ||x - x_received||^2``, summed over all trained
arrays, so that a site with many steps or with unusual images strays less from the common state.
For a low-rank pair the term is on its factors, not on their product: a site that moves both by
little moves the product by little, ``||a b - a0 b0|| <= ||a - a0|| ||b|| + ||a0|| ||b - b0||``.
It does not depend on the order, the signs or a rotation of the directions, but on how the size
is shared between the factors; strategies that cut return equal shares.

The gradient of the term, ``mu (x - x_received)``, is added to that of the loss where Adam takes
it, so the reported loss stays the loss. Adam divides by the size of gradients: a strong term does
not make steps smaller than the learning rate, it turns them back.

Source:
    FedProx, https://arxiv.org/abs/1812.06127, equation 2.
"""

from collections.abc import Sequence
from typing import Any

import keras


class ProximalAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Adam on the loss plus the proximal term.

    Args:
        mu: Strength of the term.
    """

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = mu
        self._anchors: list[Any] = []  # and never what is trained: Keras would count it as ours

    def build(self, variables: Sequence[Any]) -> None:
        """Make the variables; where to hold to is among them, so nothing is traced again."""
        if self.built:
            return
        super().build(variables)
        self._anchors = self.add_optimizer_variables(variables, "anchor")

    def hold(self, variables: Sequence[Any]) -> None:
        """Hold variables, those that this was built for, to their present values from now on."""
        for variable, anchor in zip(variables, self._anchors, strict=True):
            anchor.assign(variable.numpy())

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any]) -> None:
        """Take a step along the gradients of the loss and of the term."""
        pairs = zip(grads, trainable_variables, self._anchors, strict=True)
        pulled = [gradient + self.mu * (now - held) for gradient, now, held in pairs]
        super().apply(pulled, trainable_variables)
