"""What was not annotated is neither learned nor denied, whatever the base's loss is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import TINY  # noqa: E402 - needs keras
from dafne_federated.core.loss_parts import loss_in_parts  # noqa: E402
from dafne_federated.core.partial_labels import marginal_loss  # noqa: E402
from dafne_federated.core.training import slice_dice  # noqa: E402

ops = keras.ops
CHANNELS, MISSING = 4, (1, 3)


def of_dafne(truth: Any, output: Any) -> Any:
    from dafne_dl.common.preprocess_train import weighted_loss

    return weighted_loss(truth, output)


def with_dice(truth: Any, output: Any) -> Any:
    """As in models made here: cross-entropy, and Dice of each label."""
    weight, probability = output[..., -1], output[..., :-1]
    right = ops.sum(truth * probability, axis=-1)
    entropy = -ops.sum(weight * ops.log(ops.maximum(right, 1e-30))) / ops.sum(weight)
    overlap = ops.sum((truth * probability)[..., 1:], axis=(0, 1, 2))
    size = ops.sum((truth + probability)[..., 1:], axis=(0, 1, 2))
    return entropy - ops.mean((2 * overlap + 1) / (size + 1))


def each_logarithm(truth: Any, output: Any) -> Any:
    return -ops.sum(truth * ops.log(output[..., :-1]))


LOSSES = pytest.mark.parametrize("loss", [of_dafne, with_dice, each_logarithm])


def drawn(seed: int = 1) -> tuple[Any, Any, np.ndarray]:
    """Return one-hot targets without missing labels, logits, and weights."""
    generator = np.random.default_rng(seed)
    truth = np.eye(CHANNELS, dtype="float32")[generator.choice([0, 2], (2, 5, 6))]
    logits = generator.normal(0, 3, (2, 5, 6, CHANNELS)).astype("float32")
    return truth, logits, generator.uniform(0.1, 12, (2, 5, 6, 1)).astype("float32")


def output_of(logits: Any, weights: Any) -> Any:
    return ops.concatenate([ops.softmax(logits) + TINY, ops.convert_to_tensor(weights)], axis=-1)


def gradient(function: Callable[[Any], Any], at: Any) -> tuple[Any, np.ndarray]:
    import tensorflow as tf

    point = tf.constant(at)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = tf.reduce_sum(function(point))
    return value.numpy(), tape.gradient(value, point).numpy()


@LOSSES
def test_nothing_missing_is_the_loss_itself(loss: Any) -> None:
    assert marginal_loss(loss, CHANNELS, ()) is loss


@LOSSES
def test_the_value_is_that_of_a_network_whose_channels_are_merged(loss: Any) -> None:
    truth, logits, weights = drawn()
    output = np.asarray(output_of(logits, weights))
    merged = output.copy()
    merged[..., 0] += output[..., list(MISSING)].sum(axis=-1)
    merged[..., list(MISSING)] = TINY
    found = marginal_loss(loss, CHANNELS, MISSING)(truth, ops.convert_to_tensor(output))
    want = loss(truth, ops.convert_to_tensor(merged))
    np.testing.assert_allclose(found, want, rtol=1e-6)


@LOSSES
def test_nothing_pushes_a_missing_label_and_background_apart(loss: Any) -> None:
    truth, logits, weights = drawn()
    output = np.asarray(output_of(logits, weights))
    masked = marginal_loss(loss, CHANNELS, MISSING)
    _, slope = gradient(lambda o: masked(truth, o), output)
    assert np.abs(slope[..., 0]).max() > 0
    for channel in MISSING:
        np.testing.assert_array_equal(slope[..., channel], slope[..., 0])
    # The same from the logits: what stays in the sum of background and missing labels alone,
    # with all else as it is, has no slope. Plain, it has.
    share = np.exp(logits) / np.exp(logits)[..., [0, *MISSING]].sum(axis=-1, keepdims=True)
    along = np.zeros_like(logits)
    along[..., 0], along[..., 1] = share[..., 1], -share[..., 0]
    moved = []
    for function in (masked, loss):
        _, slope = gradient(lambda z, f=function: f(truth, output_of(z, weights)), logits)
        moved.append(np.abs((slope * along)[truth[..., 0] == 1].sum(axis=-1)).max())
    assert moved[0] < 1e-4 * moved[1]


@LOSSES
def test_annotated_labels_are_learned_as_ever(loss: Any) -> None:
    truth, logits, weights = drawn()
    masked = marginal_loss(loss, CHANNELS, MISSING)
    annotated = truth[..., 2] == 1
    _, slope = gradient(lambda z: masked(truth, output_of(z, weights)), logits)
    assert (slope[annotated][:, 2] < 0).all()
    assert (slope[annotated][:, [0, *MISSING]] > 0).all()


@LOSSES
def test_it_stays_finite_where_the_network_is_sure(loss: Any) -> None:
    truth, logits, weights = drawn()
    sure = np.float32(200) * np.eye(CHANNELS, dtype="float32")[logits.argmax(axis=-1)]
    sure[truth[..., 2] == 1] = [0, 0, 200, 0]  # no loss is finite for a sure error
    sure[truth[..., 0] == 1] = [0, 200, 0, 0]  # sure of a label that nobody annotated
    masked = marginal_loss(loss, CHANNELS, MISSING)
    value, slope = gradient(lambda z: masked(truth, output_of(z, weights)), sure)
    assert np.isfinite(value)
    assert np.abs(slope).max() < 1e-4


def test_cutting_it_into_parts_again_leaves_it_as_it_is() -> None:
    masked = marginal_loss(of_dafne, CHANNELS, MISSING)
    assert loss_in_parts(masked, CHANNELS) is masked


def test_a_missing_label_that_is_found_counts_as_background_in_the_dice() -> None:
    from dafne_federated.core.slices import PreparedSlices

    labels = np.array([[[0, 0, 2, 2]]], np.uint8)
    nothing = np.zeros(labels.shape, np.float32)
    slices = PreparedSlices(nothing, labels, nothing, CHANNELS)
    found = np.eye(CHANNELS)[np.array([[[1, 3, 2, 2]]])]
    assert slice_dice(lambda _: found, slices) == pytest.approx(1 / 3)
    assert slice_dice(lambda _: found, slices, missing=MISSING) == 1
