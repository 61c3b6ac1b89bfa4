"""Training in steps is training at once, and Dice over slices is what a pencil says."""

from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.errors import StateError  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan, Target  # noqa: E402
from dafne_federated.core.slices import PreparedSlices  # noqa: E402
from dafne_federated.core.training import AdapterTraining, Part, slice_dice  # noqa: E402


def adapted_network() -> AdaptedNetwork:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 2))
    head = keras.layers.Conv2D(2, 1, activation="softmax")(inputs[..., :1])
    network = keras.Model(inputs, keras.layers.Concatenate()([head, inputs[..., 1:]]))
    shapes = [tuple(w.shape) for w in network.weights]
    targets = tuple(
        Target(key=f"{n:04d}", layer="head", kind="delta", shape=s) for n, s in enumerate(shapes)
    )
    plan = AdaptationPlan(
        base_digest="0" * 64, method="head", rank=1, max_rank=1, scale=1, labels=("a",),
        targets=targets,
    )  # fmt: skip
    return AdaptedNetwork(network, plan)


def loss(truth: Any, output: Any) -> Any:
    right = keras.ops.sum(truth * output[..., :-1], axis=-1)
    return -keras.ops.mean(output[..., -1] * keras.ops.log(right))


def some_slices(count: int) -> PreparedSlices:
    images = np.random.default_rng(1).normal(size=(count, 4, 4)).astype(np.float32)
    labels = (images > 0).astype(np.uint8)
    return PreparedSlices(images, labels, np.ones_like(images), channels=2)


def test_another_process_goes_on_in_the_same_bits() -> None:
    slices = some_slices(5)
    whole = adapted_network()
    training = AdapterTraining(whole, loss)
    losses = [training.epoch(slices, 2, rate, (3, n)) for n, rate in enumerate((0.1, 0.05, 0.01))]
    first = adapted_network()
    training = AdapterTraining(first, loss)
    assert training.epoch(slices, 2, 0.1, (3, 0)) == losses[0]
    state, optimiser = first.read(), training.optimiser()
    second = adapted_network()
    training = AdapterTraining(second, loss)
    second.write(state)
    training.set_optimiser(optimiser)
    assert [training.epoch(slices, 2, r, (3, n)) for n, r in ((1, 0.05), (2, 0.01))] == losses[1:]
    for key, array in whole.read().items():
        assert np.abs(array).max() > 0
        np.testing.assert_array_equal(second.read()[key], array)


def test_an_optimiser_of_another_plan_is_refused() -> None:
    training = AdapterTraining(adapted_network(), loss)
    values = training.optimiser()
    last = max(values)
    for wrong in (
        {key: value for key, value in values.items() if key != last},
        values | {last: np.zeros(99, np.float32)},
    ):
        with pytest.raises(StateError, match="optimiser: expected"):
            training.set_optimiser(wrong)


def test_a_restart_forgets_what_the_optimiser_knew() -> None:
    training = AdapterTraining(adapted_network(), loss)
    fresh = training.optimiser()
    training.epoch(some_slices(4), 2, 0.1, (1, 1))
    assert not np.array_equal(training.optimiser()["0000"], fresh["0000"])
    training.restart()
    for key, value in training.optimiser().items():
        np.testing.assert_array_equal(value, fresh[key])


def test_a_part_gives_its_own_slices() -> None:
    slices = some_slices(5)
    part = Part(slices, 2, 3)
    assert len(part) == 3
    inputs, targets = part.batch(np.array([0, 2]))
    np.testing.assert_array_equal(inputs[..., 0], slices.images[[2, 4]])
    np.testing.assert_array_equal(targets.argmax(axis=-1), slices.labels[[2, 4]])


def test_dice_over_slices_is_the_hand_worked_number() -> None:
    """Truth: 4 pixels of label 1; found: 3 of them and 1 more, so 2 * 3 / (4 + 4)."""
    labels = np.zeros((3, 2, 3), np.uint8)
    labels[0, 0, :2] = labels[2, 0, :2] = 1
    found = labels.copy()
    found[2, 0, 1], found[1, 1, 1] = 0, 1
    images = found.astype(np.float32)
    slices = PreparedSlices(images, labels, np.zeros_like(images), channels=3)

    def predict(inputs: Any) -> Any:
        return np.stack(
            [1 - inputs[..., 0], inputs[..., 0], 0 * inputs[..., 0], 9 + inputs[..., 1]], -1
        )

    for batch_size in (1, 2, 3, 8):
        assert slice_dice(predict, slices, batch_size) == pytest.approx(0.75)
