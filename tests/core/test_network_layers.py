"""Layers are described by what they are, what training may change, and how much they work."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.errors import AdapterError  # noqa: E402
from dafne_federated.core.methods import frozen_share, plan_targets  # noqa: E402
from dafne_federated.core.network_layers import describe_layers, roles  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan, Target  # noqa: E402

layers = keras.layers


def network() -> "keras.Model":
    inputs = keras.Input((12, 12, 2))
    level = layers.Conv2D(4, 3, padding="same", groups=2)(inputs)
    level = layers.BatchNormalization()(level)
    level = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(level)
    level = layers.Conv2D(6, 2, strides=2)(level)
    level = layers.PReLU(shared_axes=[1, 2])(layers.Conv2DTranspose(5, 2, strides=2)(level))
    return keras.Model(inputs, layers.Dense(3)(level))


def test_kinds_are_told_apart() -> None:
    found = describe_layers(network())
    assert [layer.kind for layer in found] == [
        *("conv", "norm", "depthwise", "conv", "conv-transpose", "other", "dense")
    ]
    assert [bool(layer.refused) for layer in found] == [True, True, True, False, False, True, False]
    assert [layer.decoder for layer in found] == [False] * 4 + [True] * 3


def test_work_is_that_of_the_shapes() -> None:
    described = describe_layers(network())
    whole, half = 12 * 12, 6 * 6
    work = [
        whole * 9 * 1 * 4,  # two groups: each output sees one input channel
        0,
        whole * 9 * 8,
        half * 4 * 8 * 6,
        half * 4 * 6 * 5,  # transposed: each input pixel meets the whole kernel
        0,
        whole * 5 * 3,
    ]
    assert [layer.work for layer in described] == work
    share = frozen_share(described, plan_targets("decoder", described))
    assert share == pytest.approx(sum(work[:4]) / sum(work))
    assert frozen_share(described, plan_targets("full", described)) == 0.0


def test_work_is_unknown_where_sizes_are_open() -> None:
    inputs = keras.Input((None, None, 1))
    open_size = keras.Model(inputs, layers.Conv2D(2, 1)(layers.Conv2D(2, 3)(inputs)))
    described = describe_layers(open_size)
    assert frozen_share(described, plan_targets("head", described)) is None


def test_an_upsampling_begins_the_decoder() -> None:
    inputs = keras.Input((4, 4, 1))
    level = layers.UpSampling2D(2)(layers.Conv2D(2, 3, padding="same")(inputs))
    found = describe_layers(keras.Model(inputs, layers.Conv2D(2, 1)(level)))
    assert [layer.decoder for layer in found] == [False, True]


def test_roles_are_unique_and_never_statistics() -> None:
    attention = layers.MultiHeadAttention(2, 3)
    inputs = keras.Input((5, 4))
    keras.Model(inputs, attention(inputs, inputs))
    assert list(roles(attention))[:4] == ["kernel", "bias", "kernel 2", "bias 2"]
    assert len(roles(attention)) == 8
    norm = layers.BatchNormalization()
    norm.build((None, 3))
    norm.trainable = False
    assert list(roles(norm)) == ["gamma", "beta"]


def test_statistics_cannot_be_planned() -> None:
    base = network()
    index = [variable.name for variable in base.weights].index("moving_mean")
    plan = AdaptationPlan(
        base_digest="0" * 64,
        method="norm",
        rank=1,
        max_rank=1,
        scale=1.0,
        labels=("a",),
        targets=(Target(key=f"{index:04d}", layer="?", kind="delta", shape=(4,)),),
    )
    with pytest.raises(AdapterError, match=f"no trainable weights \\['{index:04d}'\\]"):
        AdaptedNetwork(base, plan)


def test_scales_are_one_for_each_output_channel() -> None:
    described = describe_layers(network())
    shapes = {
        target.layer: target.arrays(1)["scale"]
        for target in plan_targets("ssf", described)
        if target.kind.startswith("scale")
    }
    assert list(shapes.values()) == [(4,), (4,), (4, 2), (6,), (5, 1)]
    sizes = [np.prod(shape) for shape in shapes.values()]
    assert sizes == [4, 4, 8, 6, 5]
