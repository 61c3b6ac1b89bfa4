"""Adapters on a Keras network: attach a plan, read and write its state, run it.

Each planned layer runs its own code with its frozen weights plus the planned changes, so
layers of any kind can be trained whole or scaled. How a low-rank pair runs forward with one
kernel and backward without the gradient of it is said in ``low_rank_layers.py``.

Stored statistics of normalisations that a plan sets are no trained variables: writing a state
changes them in the network itself, to base plus change, and reading gives back what was written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from dafne_federated.core.errors import AdapterError, StateError
from dafne_federated.core.low_rank_layers import low_rank_call
from dafne_federated.core.network_layers import Tensor, finish, leaf_layers, roles
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import State, check_state, state_rank
from dafne_federated.core.strategy_table import Factors

# Added to each probability before the loss: the logarithm of zero stays finite, and float32
# has no digits left to show it on anything above 1e-22.
TINY = 1e-30


class AdaptedNetwork:
    """A base network with a plan attached; owns the network from then on.

    Args:
        network: The built base network with its base weights. It is frozen, and the planned
            layers compute with their changes from now on.
        plan: What is trained.
        rank: Rank of the low-rank pairs; by default the plan's own.

    Attributes:
        statistics: A number that grows with each change of the stored statistics.

    Raises:
        AdapterError: The plan names weights that the network does not have.
    """

    def __init__(self, network: keras.Model, plan: AdaptationPlan, rank: int | None = None) -> None:
        self.plan = plan
        self.rank = rank or plan.rank
        self.network = network
        network.trainable = True  # what training may change is now told from statistics
        self.trained = _Trained(network, plan.state_shapes(self.rank, trained=True))
        self.statistics = 0
        self._stored: dict[str, _Stored] = {}
        self._attach()
        network.trainable = False
        network.predict_function = None  # one traced before would go on without the changes
        trained = {id(variable) for variable in self.trained.trainable_variables}
        if trained != {id(variable) for variable in self.trained.changes.values()}:
            msg = f"expected to train the planned arrays only, got {len(trained)} variables"
            raise AdapterError(msg)

    def write(self, state: State) -> None:
        """Write a state of this plan and rank into the adapters, all or nothing.

        Raises:
            StateError: The state is not one of this plan, or a variance would be negative.
            AdapterError: Its rank differs from the one attached.
        """
        check_state(self.plan, state)
        rank = state_rank(self.plan, state)
        if rank != self.rank and any(target.low_rank for target in self.plan.targets):
            msg = f"this network was prepared for rank {self.rank}, got a state of rank {rank}"
            raise AdapterError(msg)
        stored = self._stored.items()  # compared bit for bit, because they are to come back so
        moved = {k: s for k, s in stored if s.delta.tobytes() != state[k].tobytes()}
        values = {key: statistic.moved_by(state[key]) for key, statistic in moved.items()}
        for key, statistic in moved.items():
            statistic.variable.assign(values[key])
            statistic.delta = state[key].copy()
        self.statistics += bool(moved)
        for key, variable in self.trained.changes.items():
            variable.assign(state[key])

    def train_factors(self, factors: Factors) -> None:
        """Let training move both factors of low-rank pairs or one; the rest moves always.

        To be called before training is compiled, which looks at it once.
        """
        for key, variable in self.trained.changes.items():
            variable.trainable = key[-2:] not in ("/a", "/b") or factors in ("both", key[-1])

    def read(self) -> State:
        """Return the current state, float32, by state key."""
        trained = {k: np.array(v.numpy(), np.float32) for k, v in self.trained.changes.items()}
        return trained | {key: statistic.delta.copy() for key, statistic in self._stored.items()}

    def predict(self, images: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return the network's output for (n, rows, columns, channels), float32."""
        return np.asarray(self.trained.predict_on_batch(images.astype(np.float32)), np.float32)

    def _attach(self) -> None:
        keys = {id(v): f"{i:04d}" for i, v in enumerate(self.network.weights)}
        for pair in self.plan.normalisations:
            for statistic in pair:
                self._stored[f"{statistic.key}/delta"] = _Stored(self.network, statistic)
        targets = {target.key: target for target in self.plan.targets if target.trained}
        for layer in leaf_layers(self.network):
            planned = {}
            for role, variable in roles(layer).items():
                target = targets.pop(keys[id(variable)], None)
                if target is None:
                    continue
                if tuple(variable.shape) != target.shape:
                    msg = (
                        f"weight {target.key} ({layer.name}): the plan expects shape "
                        f"{target.shape}, the network has {tuple(variable.shape)}"
                    )
                    raise AdapterError(msg)
                planned[role] = target
            if planned:
                layer.call = self._changed_call(layer, planned)
        if targets:
            msg = f"the network has no trainable weights {sorted(targets)}"
            raise AdapterError(msg)

    def _changed_call(
        self, layer: keras.layers.Layer, planned: dict[str, Target]
    ) -> Callable[..., Tensor]:
        changes, scale, frozen = self.trained.changes, self.plan.scale, roles(layer)
        own_call = partial(type(layer).call, layer)  # never one that an earlier plan left here

        def weights() -> dict[str, Tensor]:
            values = {role: ops.convert_to_tensor(v) for role, v in frozen.items()}
            for role, target in planned.items():
                if target.kind == "delta":
                    values[role] = values[role] + changes[f"{target.key}/delta"]
                elif not target.low_rank:
                    values[role] = values[role] * (1 + changes[f"{target.key}/scale"])
            return values

        def call_whole(*inputs: Tensor, **options: Any) -> Tensor:
            now = [(frozen[role], value) for role, value in weights().items()]
            with keras.StatelessScope(now, initialize_variables=False):
                return own_call(*inputs, **options)

        def call_low_rank(inputs: Tensor, **_options: Any) -> Tensor:
            now, target = weights(), planned["kernel"]
            a = ops.convert_to_tensor(changes[f"{target.key}/a"])
            b = ops.convert_to_tensor(changes[f"{target.key}/b"])
            outputs = low_rank_call(layer, target, inputs, now["kernel"], scale * a, b)
            return finish(layer, outputs, now)

        return call_low_rank if any(t.low_rank for t in planned.values()) else call_whole


class _Stored:
    """One stored statistic of a normalisation, float32."""

    def __init__(self, network: keras.Model, target: Target) -> None:
        index = int(target.key)
        weights = network.weights
        name = f"moving_{target.kind}"
        found = weights[index] if index < len(weights) else None
        if found is None or (found.name, tuple(found.shape)) != (name, target.shape):
            got = "nothing" if found is None else f"{found.name} of shape {tuple(found.shape)}"
            msg = f"weight {target.key}: the plan expects {name} of {target.shape}, got {got}"
            raise AdapterError(msg)
        self.target = target
        self.variable = found
        self.base = np.array(ops.convert_to_numpy(found), np.float64)
        self.delta = np.zeros(target.shape, np.float32)

    def moved_by(self, delta: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the base's value plus ``delta``, as folding does it."""
        value = self.base + delta.astype(np.float64)
        if self.target.kind == "variance" and (value < 0).any():
            msg = f"weight {self.target.key!r}: expected variances of at least 0 after the change"
            raise StateError(msg)
        return value.astype(np.float32)


class _Trained(keras.Model):  # type: ignore[misc]
    """The network with the changes as its only trainable variables."""

    def __init__(self, network: keras.Model, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(name="adapted")
        self.network = network
        self.changes = {
            key: self.add_weight(
                shape=shape, initializer="zeros", dtype="float32", name=key.replace("/", "_")
            )
            for key, shape in shapes.items()
        }
        self.built = True

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        return positive(self.network(inputs, training=False))


def positive(outputs: Tensor) -> Tensor:
    """Return a network's output with no probability of zero; the weight map stays."""
    channels = outputs.shape[-1]
    return outputs + ops.convert_to_tensor(np.array([TINY] * (channels - 1) + [0], np.float32))
