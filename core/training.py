"""Local training: epochs over prepared slices, for adapters and for whole networks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

from dafne_federated.core.loss_parts import Loss, loss_in_parts
from dafne_federated.core.plan import AdaptationPlan
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
class TrainingResult:
    """What local training did.

    Attributes:
        loss: Loss of the last epoch, mean over its steps, on the base's own scale.
        steps: Optimiser steps.
        seconds: Wall time.
    """

    loss: float
    steps: int
    seconds: float


class AdapterTraining:
    """Training of one adapted network; the compiled step is kept between rounds and sites.

    Args:
        adapted: The network with its plan, or its suffix.
        loss: The loss of the base's own training function.
    """

    def __init__(self, adapted: Trainable, loss: Loss) -> None:
        self._trained = adapted.trained
        loss = loss_in_parts(loss, len(adapted.plan.labels) + 1)
        self._trained.compile(optimizer=keras.optimizers.Adam(), loss=loss)
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
    ) -> TrainingResult:
        """Train from the state that is written in the network, with a fresh optimiser.

        Args:
            slices: Training slices.
            epochs: Passes over them.
            batch_size: Slices in a step.
            learning_rate: Of Adam.
            seed: Order of the slices; the same seed gives the same bits.
            on_epoch: Called with the epoch, 1 first, and its loss.
        """
        for variable, value in zip(self._trained.optimizer.variables, self._start, strict=True):
            variable.assign(value)
        self._trained.optimizer.learning_rate.assign(learning_rate)
        generator = np.random.default_rng(seed)
        begun, losses, steps = time.monotonic(), [0.0], 0
        for epoch in range(1, epochs + 1):
            losses = train_epoch(self._trained, slices, batch_size, generator)
            steps += len(losses)
            if on_epoch:
                on_epoch(epoch, float(np.mean(losses)))
        return TrainingResult(float(np.mean(losses)), steps, time.monotonic() - begun)


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
    begun, best, kept = time.monotonic(), 0, network.get_weights()
    history: list[tuple[float, float | None]] = []
    for epoch in range(1, epochs + 1):
        losses = train_epoch(network, training, batch_size, generator)
        score = slice_dice(network.predict_on_batch, validation) if validation else None
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
    predict: Callable[[npt.NDArray[np.float32]], Any],
    slices: PreparedSlices,
    batch_size: int = 8,
) -> float:
    """Return the Dice over all pixels of all slices, mean over the labels that occur."""
    both = np.zeros(slices.channels)
    sizes = np.zeros(slices.channels)
    inputs = slices.inputs()
    for start in range(0, len(slices), batch_size):
        output = np.asarray(predict(inputs[start : start + batch_size]))
        found = output[..., : slices.channels].argmax(axis=-1)
        truth = slices.labels[start : start + batch_size]
        both += np.bincount(truth[truth == found].ravel(), minlength=slices.channels)
        sizes += np.bincount(truth.ravel(), minlength=slices.channels)
        sizes += np.bincount(found.ravel(), minlength=slices.channels)
    occurring = sizes[1:] > 0
    return float((2 * both[1:] / np.maximum(sizes[1:], 1))[occurring].mean())
