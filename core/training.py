"""Local training: epochs over prepared slices, for adapters and for whole networks."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import StateError
from dafne_federated.core.loss_parts import Loss, loss_in_parts
from dafne_federated.core.optimiser_state import AdamState
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.proximal import ProximalAdam
from dafne_federated.core.slices import PreparedSlices

OnEpoch = Callable[[int, float], None]


class Trainable(Protocol):
    """A network whose trainable variables are those of adapters."""

    @property
    def plan(self) -> AdaptationPlan:
        """What is trained."""

    @property
    def trained(self) -> keras.Model:
        """The network as a model, not compiled."""


class Batches(Protocol):
    """Slices to train on."""

    def __len__(self) -> int: ...

    def batch(self, chosen: npt.NDArray[np.intp]) -> tuple[Any, npt.NDArray[np.float32]]:
        """Return input and target of the chosen slices."""


@dataclass(frozen=True)
class Part:
    """Some slices of many, those from ``first`` on.

    Attributes:
        whole: All slices.
        first: Number of the first one of this part.
        count: Slices of this part.
    """

    whole: Batches
    first: int
    count: int

    def __len__(self) -> int:
        """Return the number of slices of this part."""
        return self.count

    def batch(self, chosen: npt.NDArray[np.intp]) -> tuple[Any, npt.NDArray[np.float32]]:
        """Return input and target of the chosen slices."""
        return self.whole.batch(chosen + self.first)


@dataclass(frozen=True)
class TrainingResult:
    """What local training did.

    Attributes:
        loss: Loss of the last epoch, mean over its steps, on the base's own scale; None where
            nothing hides it.
        steps: Optimiser steps.
        seconds: Wall time.
    """

    loss: float | None
    steps: int
    seconds: float


class AdapterTraining:
    """Training of one adapted network; the compiled step is kept between rounds and sites.

    ``run`` is all of a round at once. ``restart`` and then ``epoch`` again and again is the
    same in steps; with ``optimiser`` and ``set_optimiser`` a later process can go on.

    Args:
        adapted: The network with its plan, or its suffix.
        loss: The loss of the base's own training function.
        proximal: How strongly ``run`` holds to the state that it starts from; see
            ``core/proximal.py``. The loss that is reported is without this term.
    """

    def __init__(self, adapted: Trainable, loss: Loss, proximal: float = 0.0) -> None:
        self._trained = adapted.trained
        loss = loss_in_parts(loss, len(adapted.plan.labels) + 1)
        adam = ProximalAdam(proximal) if proximal else keras.optimizers.Adam()
        self._trained.compile(optimizer=adam, loss=loss)
        self._trained.optimizer.build(self._trained.trainable_variables)
        self._start = [np.array(v.numpy()) for v in self._trained.optimizer.variables]

    def run(
        self,
        slices: Batches,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        on_epoch: OnEpoch | None = None,
        adam: AdamState | None = None,
    ) -> TrainingResult:
        """Train from the state that is written in the network.

        Args:
            slices: Training slices.
            epochs: Passes over them.
            batch_size: Slices in a step.
            learning_rate: Of Adam.
            seed: Order of the slices; the same seed gives the same bits.
            on_epoch: Called with the epoch, 1 first, and its loss.
            adam: What the optimiser knows at the start; by default it is a fresh one.

        Raises:
            StateError: ``adam`` is that of another plan.
        """
        self.restart()
        if adam:
            self._set_adam(adam)
        if isinstance(self._trained.optimizer, ProximalAdam):
            self._trained.optimizer.hold(self._trained.trainable_variables)
        self._trained.optimizer.learning_rate.assign(learning_rate)
        generator = np.random.default_rng(seed)
        begun, losses, steps = time.monotonic(), [0.0], 0
        for epoch in range(1, epochs + 1):
            losses = train_epoch(self._trained, slices, batch_size, generator)
            steps += len(losses)
            if on_epoch:
                on_epoch(epoch, float(np.mean(losses)))
        return TrainingResult(float(np.mean(losses)), steps, time.monotonic() - begun)

    def restart(self) -> None:
        """Make the optimiser a fresh one."""
        self._assign(self._start)

    def optimiser(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return all that the optimiser knows, by the number of the variable."""
        variables = self._trained.optimizer.variables
        return {f"{number:04d}": np.array(v.numpy()) for number, v in enumerate(variables)}

    def set_optimiser(self, values: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Give the optimiser what ``optimiser`` returned.

        Raises:
            StateError: The arrays are those of another plan.
        """
        expected = {key: (v.shape, v.dtype) for key, v in self.optimiser().items()}
        got = {key: (value.shape, value.dtype) for key, value in values.items()}
        if got != expected:
            msg = f"optimiser: expected {len(expected)} arrays of this plan, got {len(got)} others"
            raise StateError(msg)
        self._assign([values[key] for key in sorted(values)])

    def adam(self) -> AdamState:
        """Return what Adam knows by state key, and the factors that it belongs to."""
        changes = self._trained.changes
        factors = {k: np.array(v.numpy()) for k, v in changes.items() if k[-2:] in ("/a", "/b")}
        first, second = ({k: np.array(v.numpy()) for k, v in m.items()} for m in self._moments())
        return AdamState(int(self._trained.optimizer.iterations.numpy()), first, second, factors)

    def epoch(
        self, slices: Batches, batch_size: int, learning_rate: float, order: Sequence[int]
    ) -> float:
        """Train one epoch from where the last one ended, and return the mean loss of its steps.

        Args:
            slices: Training slices.
            batch_size: Slices in a step.
            learning_rate: Of Adam in this epoch.
            order: What the order of the slices follows from, e.g. seed and epoch.
        """
        self._trained.optimizer.learning_rate.assign(learning_rate)
        generator = np.random.default_rng(order)
        return float(np.mean(train_epoch(self._trained, slices, batch_size, generator)))

    def dice(self, slices: Batches, missing: Collection[int] = ()) -> float:
        """Return the Dice of the current state; see ``slice_dice``."""
        return slice_dice(self._trained.predict_on_batch, slices, batch_size=4, missing=missing)

    def _set_adam(self, adam: AdamState) -> None:
        pairs = list(zip(self._moments(), (adam.first, adam.second), strict=True))
        for variables, values in pairs:
            expected = {key: tuple(v.shape) for key, v in variables.items()}
            if {key: value.shape for key, value in values.items()} != expected:
                msg = f"optimiser: expected moments of {len(expected)} arrays of this plan"
                raise StateError(f"{msg}, got {len(values)} others")
        for variables, values in pairs:
            for key, variable in variables.items():
                variable.assign(values[key])
        self._trained.optimizer.iterations.assign(adam.steps)

    def _moments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the variables of Adam's first and second moments, by state key."""
        known = {variable.name: variable for variable in self._trained.optimizer.variables}
        trained = {k: v for k, v in self._trained.changes.items() if v.trainable}
        first, second = (
            # Keras names them so: add_variable_from_reference of its optimisers.
            {k: known[f"{v.path.replace('/', '_')}_{name}"] for k, v in trained.items()}
            for name in ("momentum", "velocity")
        )
        return first, second

    def _assign(self, values: Sequence[npt.NDArray[np.generic]]) -> None:
        for variable, value in zip(self._trained.optimizer.variables, values, strict=True):
            variable.assign(value)


def train_epoch(
    network: keras.Model, slices: Batches, batch_size: int, generator: np.random.Generator
) -> list[float]:
    """Run one epoch on a compiled network and return the loss of every step.

    The slices are shuffled; those that do not fill a last batch are left for the next epoch,
    as Dafne's own generator does. Fewer slices than a batch make one smaller batch.
    """
    order = generator.permutation(len(slices))
    size = min(batch_size, len(slices))
    losses = []
    for start in range(0, len(slices) - size + 1, size):
        inputs, targets = slices.batch(order[start : start + size])
        losses.append(float(network.train_on_batch(inputs, targets)))
    return losses


@dataclass(frozen=True)
class Fit:
    """A whole network trained from scratch.

    Attributes:
        best_epoch: The epoch whose weights were kept, 1 first.
        best_dice: Its Dice on the validation slices, mean over labels; None without any.
        history: Per epoch: loss and validation Dice.
        seconds: Wall time.
    """

    best_epoch: int
    best_dice: float | None
    history: list[tuple[float, float | None]]
    seconds: float


def train_network(
    network: keras.Model,
    loss: Loss,
    training: PreparedSlices,
    validation: PreparedSlices | None,
    epochs: int,
    patience: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_epoch: Callable[[int, float, float | None], None] | None = None,
) -> Fit:
    """Train all weights and keep those of the epoch with the best validation Dice.

    The Dice is measured in inference mode, so it sees the stored batch statistics that the
    file will hold: an epoch whose statistics lag behind is never kept.

    Args:
        network: A built network in Dafne's form; changed in place.
        loss: Called with one-hot targets and the network's output.
        training: Slices to train on.
        validation: Slices of other persons, to choose the epoch; None keeps the last one.
        epochs: At most so many.
        patience: Stop after so many epochs without a better Dice.
        batch_size: Slices in a step.
        learning_rate: Of Adam at the start; it falls to a tenth along a cosine.
        seed: Order of the slices.
        on_epoch: Called with epoch, loss and validation Dice.
    """
    steps = epochs * max(len(training) // batch_size, 1)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps, alpha=0.1)
    network.trainable = True
    network.compile(optimizer=keras.optimizers.Adam(schedule, clipnorm=1.0), loss=loss)
    generator = np.random.default_rng(seed)
    unseen = validation.without_weights() if validation else None
    begun, best, kept = time.monotonic(), 0, network.get_weights()
    history: list[tuple[float, float | None]] = []
    for epoch in range(1, epochs + 1):
        losses = train_epoch(network, training, batch_size, generator)
        score = slice_dice(network.predict_on_batch, unseen) if unseen else None
        history.append((float(np.mean(losses)), score))
        before = history[best][1]
        if epoch == 1 or score is None or before is None or score > before:
            best, kept = epoch - 1, network.get_weights()
        if on_epoch:
            on_epoch(epoch, *history[-1])
        if epoch - 1 - best >= patience:
            break
    network.set_weights(kept)
    return Fit(best + 1, history[best][1], history, time.monotonic() - begun)


def slice_dice(
    predict: Callable[[Any], Any],
    slices: Batches,
    batch_size: int = 8,
    missing: Collection[int] = (),
) -> float:
    """Return the Dice over all pixels of all slices, mean over the labels that occur.

    Args:
        predict: Returns the network's output for the input of some slices.
        slices: Slices without a weight map, as in use.
        batch_size: Slices at once; the last few are filled up, so that all batches have one size.
        missing: Channels of labels that nobody annotated, which count as background.
    """
    size = min(batch_size, len(slices))
    both: Any = 0
    sizes: Any = 0
    for start in range(0, len(slices), size):
        chosen = np.minimum(np.arange(start, start + size), len(slices) - 1)
        inputs, targets = slices.batch(chosen)
        channels = targets.shape[-1]
        merged = np.array([0 if c in missing else c for c in range(channels)])
        kept = slice(0, len(slices) - start)
        truth = targets[kept].argmax(axis=-1)
        found = merged[np.asarray(predict(inputs))[kept, ..., :channels].argmax(axis=-1)]
        both += np.bincount(truth[truth == found].ravel(), minlength=channels)
        sizes += np.bincount(truth.ravel(), minlength=channels)
        sizes += np.bincount(found.ravel(), minlength=channels)
    occurring = sizes[1:] > 0
    return float((2 * both[1:] / np.maximum(sizes[1:], 1))[occurring].mean())
