"""A layer with a low-rank change computes, and learns, as one with the changed kernel."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.low_rank_layers import low_rank_call, low_rank_change  # noqa: E402
from dafne_federated.core.network_layers import convolve  # noqa: E402
from dafne_federated.core.plan import Target  # noqa: E402
from dafne_federated.core.state import kernel_update  # noqa: E402

layers = keras.layers
CHANNELS = 5
KINDS = {
    "conv": (lambda n: layers.Conv2D(n, 3, padding="same"), (7, 7)),
    "conv strided": (lambda n: layers.Conv2D(n, 2, strides=2), (8, 8)),
    "conv 3d": (lambda n: layers.Conv3D(n, 3, padding="same"), (3, 3, 3)),
    "conv-transpose": (lambda n: layers.Conv2DTranspose(n, 3, strides=2), (4, 4)),
    "dense": (lambda n: layers.Dense(n), (6,)),
}


@pytest.mark.parametrize("covered", [None, (1, 4)])
@pytest.mark.parametrize("outputs", [3, 40], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind: str, outputs: int, covered: tuple[int, int] | None) -> None:
    import tensorflow as tf

    make, size = KINDS[kind]
    keras.utils.set_random_seed(0)
    layer = make(outputs)
    layer.build((None, *size, CHANNELS))
    target = Target(
        key="0000",
        layer="",
        kind=kind.split()[0],
        shape=tuple(layer.kernel.shape),
        inputs=covered,
    )
    generator = np.random.default_rng(1)
    pair = [generator.normal(size=shape).astype("float32") for shape in target.pair_shapes(2)]
    x = tf.constant(generator.normal(size=(2, *size, CHANNELS)).astype("float32"))
    kernel = layer.kernel.numpy()
    summands = [tf.constant(generator.normal(size=outputs).astype("float32")), tf.constant(0.5)]
    update = kernel_update(target, *pair).astype("float32")
    if covered:
        axis = -1 if kind == "conv-transpose" else -2
        outside = np.delete(update, np.s_[covered[0] : covered[1]], axis=axis)
        assert outside.size
        assert not outside.any()

    a, b = (tf.constant(array) for array in pair)
    change = tf.zeros_like(kernel)
    with tf.GradientTape() as tape:
        tape.watch([x, a, b])
        made = low_rank_call(layer, target, x, kernel, a, b, summands)
        weigh = np.cos(np.arange(made.numpy().size)).reshape(made.shape).astype("float32")
        value = tf.reduce_sum(weigh * made**2)
    of_x, of_a, of_b = (np.asarray(g, np.float64) for g in tape.gradient(value, [x, a, b]))
    with tf.GradientTape() as tape:
        tape.watch([x, change])
        expected = convolve(layer, x, kernel + update + change) + summands[0] + summands[1]
        value = tf.reduce_sum(weigh * expected**2)
    wanted_x, of_kernel = (np.asarray(g, np.float64) for g in tape.gradient(value, [x, change]))
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)
    scale = np.abs(wanted_x).max()
    np.testing.assert_allclose(of_x, wanted_x, rtol=1e-4, atol=1e-5 * scale)

    if kind == "conv-transpose":
        of_kernel = np.moveaxis(of_kernel, -1, 0)
        flat = of_kernel[slice(*covered) if covered else slice(None)]
    else:
        flat = of_kernel[..., slice(*covered) if covered else slice(None), :]
    flat_a, flat_b = (array.astype(np.float64) for array in pair)
    flat_a, flat_b = flat_a.reshape(-1, 2), flat_b.reshape(2, -1)
    flat = flat.reshape(len(flat_a), -1)
    for got, wanted in ((of_a, flat @ flat_b.T), (of_b, flat_a.T @ flat)):
        np.testing.assert_allclose(
            got.reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()
        )

    part = x[..., slice(*covered) if covered else slice(None)]
    np.testing.assert_allclose(
        low_rank_change(layer, target, part, a, b), convolve(layer, x, update), atol=1e-4
    )


def test_a_covered_range_must_lie_within_the_input_channels() -> None:
    for kind, shape, covered in [
        ("conv", (3, 3, 4, 8), (2, 5)),
        ("conv", (3, 3, 4, 8), (2, 2)),
        ("conv-transpose", (2, 2, 8, 4), (0, 5)),
        ("delta", (3, 3, 4, 8), (0, 2)),
    ]:
        with pytest.raises(ValueError, match="cannot cover input channels"):
            Target(key="0000", layer="", kind=kind, shape=shape, inputs=covered)
    target = Target(key="0000", layer="", kind="conv-transpose", shape=(2, 2, 8, 4), inputs=(1, 4))
    assert target.covered == (2, 2, 8, 3)
    assert target.pair_shapes(2) == ((3, 2), (2, 2, 2, 8))
