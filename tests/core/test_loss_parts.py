"""A loss that is given the output in parts has the same values and gradients."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.loss_parts import loss_in_parts  # noqa: E402 - needs keras

ops = keras.ops


def of_dafne(truth: object, output: object) -> object:
    from dafne_dl.common.preprocess_train import weighted_loss

    return weighted_loss(truth, output)


def with_dots(truth: object, output: object) -> object:
    right = ops.sum(truth * output[..., :-1], axis=-1)  # type: ignore[operator, index]
    return -ops.sum(output[..., -1] * ops.log(right))  # type: ignore[index, operator]


def with_other_slices(truth: object, output: object) -> object:
    weights = output[:, :, :, 3] * output[0, ..., -1] + output[..., 2:3, -1]  # type: ignore[index]
    return ops.sum(weights * output[:, 1:, :, :-1][:, :1, ..., 0])  # type: ignore[index]


def as_a_whole(truth: object, output: object) -> object:
    return ops.sum(output * 2.0)  # type: ignore[operator]


def with_attributes(truth: object, output: object) -> object:
    return ops.sum(output[..., :-1]) * float(output.shape[-1])  # type: ignore[index, attr-defined]


LOSSES = {
    f.__name__: f for f in (of_dafne, with_dots, with_other_slices, as_a_whole, with_attributes)
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_stay(name: str) -> None:
    import tensorflow as tf

    loss, changed = LOSSES[name], loss_in_parts(LOSSES[name], 3)
    assert (changed is loss) == (name == "as_a_whole")
    generator = np.random.default_rng(1)
    truth = np.eye(3, dtype="float32")[generator.integers(0, 3, (2, 4, 5))]
    output = tf.constant(generator.uniform(0.1, 1, (2, 4, 5, 4)).astype("float32"))
    found = []
    for function in (loss, changed):
        with tf.GradientTape() as tape:
            tape.watch(output)
            value = function(truth, output)
        found.append((value, tape.gradient(value, output)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
