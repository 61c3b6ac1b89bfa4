"""Training that hides each person: DP-SGD on what a plan trains, the person as the unit.

In each step every person is drawn by itself with the same probability. What a drawn person
adds is the gradient of the mean loss over a few of their slices, clipped as one vector. The
sum gets Gaussian noise, is divided by the number of persons that is expected, and goes to Adam.
What Adam and the server make of it afterwards costs no more.

Draws and noise follow from a seed that only the site can know. Noise comes from numpy's
float64 generator: attacks on the gaps between floating-point numbers are not defended against
(https://arxiv.org/abs/2112.05307), and Philox is a good generator, not a cryptographic one.

Source:
    DP-SGD, https://arxiv.org/abs/1607.00133; a person as the unit and the division by the
    expected number, https://arxiv.org/abs/1710.06963.
"""

import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from dafne_federated.core.loss_parts import Loss, loss_in_parts
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.privacy_accountant import Mechanism
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.suffix_training import SuffixTraining
from dafne_federated.core.training import Batches, Trainable, TrainingResult

Gradient = npt.NDArray[np.float64]


class PrivateTraining:
    """Private training of one adapted network; what was compiled is kept.

    Args:
        training: Where the network, or its suffix, and the loss come from.
    """

    def __init__(self, training: SuffixTraining) -> None:
        self.training = training
        self._steps: PersonSteps | None = None

    def run(
        self,
        slices: PreparedSlices,
        persons: Sequence[str],
        mechanism: Mechanism,
        epochs: int,
        most_slices: int,
        learning_rate: float,
        seed: bytes,
        cache: PrefixCache | None = None,
    ) -> TrainingResult:
        """Train from the state that is written in the network, with a fresh optimiser.

        Args:
            slices: Training slices.
            persons: Whose each slice is.
            mechanism: Noise, clip and rate.
            epochs: How often a person takes part, on average.
            most_slices: The most slices of a person in a step.
            learning_rate: Of Adam.
            seed: Secret; draws and noise follow from it. The same seed gives the same bits.
            cache: Where features are kept, if they may be.

        Returns:
            Steps and seconds; there is no loss in it, for none was hidden by noise.
        """
        begun = time.monotonic()
        network, batches = self.training.network(slices, cache)
        if self._steps is None or self._steps.network is not network:
            self._steps = PersonSteps(network, self.training.loss)
        draws, noise = generators(seed)
        owned = slices_by_person(persons)
        steps = mechanism.steps(epochs)
        self._steps.restart(learning_rate)
        for _ in range(steps):
            drawn = draw(owned, mechanism.rate, most_slices, draws)
            total = self._steps.clipped_sum(batches, drawn, mechanism.clip)
            total += noise.normal(0.0, mechanism.noise * mechanism.clip, total.shape)
            self._steps.apply(total / (mechanism.rate * len(owned)))
        return TrainingResult(None, steps, time.monotonic() - begun)


class PersonSteps:
    """Gradients of single persons on one network, and steps of Adam along their sum.

    Attributes:
        network: The network, or its suffix.
    """

    def __init__(self, network: Trainable, loss: Loss) -> None:
        self.network = network
        self._variables = network.trained.trainable_variables
        # A wrapper, so that whoever trains the network without noise keeps what was compiled.
        self._caught = _CaughtGradient()
        self._model = _Wrapped(network.trained)
        loss = loss_in_parts(loss, len(network.plan.labels) + 1)
        self._model.compile(optimizer=self._caught, loss=loss)
        self._caught.build(self._variables)
        self._adam = keras.optimizers.Adam()
        self._adam.build(self._variables)
        self._fresh = [np.array(v.numpy()) for v in self._adam.variables]

    def restart(self, learning_rate: float) -> None:
        """Make Adam a fresh one."""
        for variable, value in zip(self._adam.variables, self._fresh, strict=True):
            variable.assign(value)
        self._adam.learning_rate.assign(learning_rate)

    def gradient(self, slices: Batches, chosen: npt.NDArray[np.intp]) -> Gradient:
        """Return the gradient of the mean loss of some slices as one vector, not clipped."""
        self._model.train_on_batch(*slices.batch(chosen))
        parts = [ops.convert_to_numpy(part).ravel() for part in self._caught.gradients]
        return np.concatenate(parts).astype(np.float64)

    def clipped_sum(
        self, slices: Batches, drawn: Sequence[npt.NDArray[np.intp]], clip: float
    ) -> Gradient:
        """Return the sum of what the drawn persons add, each at most ``clip`` long.

        Args:
            slices: Training slices.
            drawn: The slices of each drawn person.
            clip: The largest L2 norm over all trained variables together.
        """
        total = np.zeros(sum(int(np.prod(v.shape)) for v in self._variables), np.float64)
        for chosen in drawn:
            total += clipped(self.gradient(slices, chosen), clip)
        return total

    def apply(self, gradient: Gradient) -> None:
        """Make a step of Adam along a vector that ``clipped_sum`` could have returned."""
        ends = np.cumsum([int(np.prod(v.shape)) for v in self._variables])[:-1]
        parts = zip(self._variables, np.split(gradient, ends), strict=True)
        given = [ops.convert_to_tensor(p.reshape(v.shape).astype(np.float32)) for v, p in parts]
        self._adam.apply(given, self._variables)


def clipped(gradient: Gradient, clip: float) -> Gradient:
    """Return a vector of the same direction, at most ``clip`` long.

    A gradient that is not finite becomes zero: it must not pass, and an error would tell the
    server that this person took part.
    """
    norm = float(np.linalg.norm(gradient))
    if not np.isfinite(norm):
        return np.zeros_like(gradient)
    return gradient * min(1.0, clip / norm) if norm else gradient


def slices_by_person(persons: Sequence[str]) -> list[npt.NDArray[np.intp]]:
    """Return the numbers of the slices of each person, persons in the order of their names."""
    owners = np.array(persons)
    return [np.flatnonzero(owners == person) for person in sorted(set(persons))]


def draw(
    owned: Sequence[npt.NDArray[np.intp]], rate: float, most: int, generator: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    """Draw each person with probability ``rate``, and at most ``most`` slices of each drawn."""
    taken = generator.random(len(owned)) < rate
    return [
        generator.choice(own, min(most, len(own)), replace=False)
        for own, take in zip(owned, taken, strict=True)
        if take
    ]


def generators(seed: bytes) -> tuple[np.random.Generator, np.random.Generator]:
    """Return one generator for the draws and one for the noise."""
    draws, noise = np.random.SeedSequence(int.from_bytes(seed)).spawn(2)
    return np.random.Generator(np.random.Philox(draws)), np.random.Generator(
        np.random.Philox(noise)
    )


class _Wrapped(keras.Model):  # type: ignore[misc]
    def __init__(self, network: keras.Model) -> None:
        super().__init__(name="one_person")
        self.network = network
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.network(inputs, training=training)


class _CaughtGradient(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Keeps the gradient in place of making a step, so that it is compiled like training."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0, name="caught_gradient")
        self.gradients: list[Any] = []

    def build(self, variables: Sequence[Any]) -> None:
        if not self.built:
            super().build(variables)
            self.gradients = [
                self.add_variable_from_reference(v, name="gradient") for v in variables
            ]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign(self.gradients[self._get_variable_index(variable)], gradient)
