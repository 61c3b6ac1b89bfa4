"""An adapter changes nothing at first, trains alone, and folds to the same network."""

import ast
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.errors import AdapterError, StateError  # noqa: E402
from dafne_federated.core.function_sources import NetworkSpec  # noqa: E402
from dafne_federated.core.model_file import keras_weights  # noqa: E402
from dafne_federated.core.network_layers import describe_layers  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan, Target, lora_targets  # noqa: E402
from dafne_federated.core.state import State, fold, initial_state  # noqa: E402

layers = keras.layers


def dafne_like(size: int = 16, labels: int = 2) -> "keras.Model":
    """A network with every kind of layer that Dafne's own networks have."""
    inputs = keras.Input((size, size, 2))
    image = layers.Lambda(lambda both: both[..., 0:1])(inputs)
    weight_map = layers.Lambda(lambda both: both[..., 1:2])(inputs)
    skip = layers.Conv2D(4, 3, padding="same", kernel_regularizer="l2")(image)
    skip = layers.Activation("relu")(layers.BatchNormalization()(skip))
    level = layers.Conv2D(6, 2, strides=2, activation="relu")(skip)
    level = layers.Conv2DTranspose(4, 2, strides=2)(level)
    level = layers.BatchNormalization()(level)
    level = layers.Concatenate()([skip, layers.Activation("relu")(level)])
    level = layers.Conv2D(4, 3, padding="same", use_bias=False)(level)
    level = layers.Conv2D(labels + 1, 1)(level)
    level = layers.Lambda(lambda x: keras.ops.softmax(x, axis=-1))(level)
    return keras.Model(inputs, layers.Concatenate()([level, weight_map]))


def single(layer: "keras.layers.Layer", shape: tuple[int, ...]) -> "keras.Model":
    """One layer of interest, then a head, so that the layer is not the head itself."""
    inputs = keras.Input(shape)
    level = layer(inputs)
    return keras.Model(inputs, layers.Activation("softmax")(layers.Dense(3)(level)))


LAYERS = {
    "conv same": (lambda: layers.Conv2D(5, 3, padding="same"), (9, 9, 2)),
    "conv valid": (lambda: layers.Conv2D(5, 3), (9, 9, 2)),
    "conv stride": (lambda: layers.Conv2D(5, 3, strides=2, padding="same"), (9, 9, 2)),
    "conv dilation": (lambda: layers.Conv2D(5, 3, dilation_rate=2), (9, 9, 2)),
    "conv uneven": (lambda: layers.Conv2D(5, (2, 5), strides=(1, 2)), (9, 9, 2)),
    "conv 1x1": (lambda: layers.Conv2D(5, 1), (9, 9, 2)),
    "conv relu no bias": (
        lambda: layers.Conv2D(5, 3, activation="relu", use_bias=False),
        (9, 9, 2),
    ),
    "conv 1d": (lambda: layers.Conv1D(5, 3, padding="same"), (9, 2)),
    "conv 3d": (lambda: layers.Conv3D(5, 3, padding="same"), (5, 5, 5, 2)),
    "transposed": (lambda: layers.Conv2DTranspose(5, 2, strides=2), (5, 5, 3)),
    "transposed 3x3": (lambda: layers.Conv2DTranspose(5, 3, strides=3), (5, 5, 3)),
    "transposed same": (lambda: layers.Conv2DTranspose(5, 3, strides=2, padding="same"), (5, 5, 3)),
    "transposed padded": (
        lambda: layers.Conv2DTranspose(5, 2, strides=2, output_padding=(1, 1), activation="relu"),
        (5, 5, 3),
    ),
    "transposed 3d": (lambda: layers.Conv3DTranspose(4, 2, strides=2), (3, 3, 3, 2)),
    "dense": (lambda: layers.Dense(5, activation="relu"), (7,)),
}


def plan_for(network: "keras.Model", where: str = "all", rank: int = 2) -> AdaptationPlan:
    return AdaptationPlan(
        base_digest="0" * 64,
        method="lora",
        rank=rank,
        max_rank=8,
        scale=0.7,
        labels=("a", "b"),
        targets=lora_targets(describe_layers(network), where),
    )


def random_state(plan: AdaptationPlan, seed: int = 5) -> State:
    generator = np.random.default_rng(seed)
    return {
        key: (0.3 * generator.normal(size=shape)).astype("float32")
        for key, shape in plan.state_shapes().items()
    }


def inputs_for(network: "keras.Model", count: int = 3) -> np.ndarray:
    shape = (count, *network.input_shape[1:])
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def outputs(network: "keras.Model", x: np.ndarray) -> np.ndarray:
    return np.asarray(network.predict_on_batch(x))


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_folds_to_what_the_adapter_computes(name: str) -> None:
    make, shape = LAYERS[name]
    keras.utils.set_random_seed(0)
    network = single(make(), shape)
    base = keras_weights(network.get_weights())
    x = inputs_for(network)
    before = outputs(network, x)
    plan = plan_for(network)
    assert plan.targets[0].kind != "delta"
    adapted = AdaptedNetwork(network, plan)
    adapted.write(initial_state(plan, 0))
    np.testing.assert_array_equal(outputs(adapted.network, x), before)

    state = random_state(plan)
    adapted.write(state)
    with_adapter = outputs(adapted.network, x)
    assert np.abs(with_adapter - before).max() > 1e-3
    folded = fold(base, plan, state)
    keras.utils.set_random_seed(0)
    plain = single(make(), shape)
    plain.set_weights([folded[key] for key in sorted(folded)])
    np.testing.assert_allclose(outputs(plain, x), with_adapter, atol=2e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_full_kernel_projected(name: str) -> None:
    """d loss / d a and d b must follow from d loss / d kernel by the chain rule."""
    import tensorflow as tf

    make, shape = LAYERS[name]
    keras.utils.set_random_seed(0)
    network = single(make(), shape)
    plan = plan_for(network)
    state = random_state(plan)
    target = plan.targets[0]
    x = tf.constant(inputs_for(network))
    aim = tf.constant(np.random.default_rng(1).normal(size=network.compute_output_shape(x.shape)))

    def loss(values: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(aim, values.dtype) * tf.square(values))

    folded = fold(keras_weights(network.get_weights()), plan, state)
    plain = single(make(), shape)
    plain.set_weights([folded[key] for key in sorted(folded)])
    with tf.GradientTape() as tape:
        value = loss(plain(x))
    kernel = tape.gradient(value, plain.weights[int(target.key)]).numpy().astype(np.float64)

    adapted = AdaptedNetwork(network, plan)
    adapted.write(state)
    changes = adapted.trained.changes
    with tf.GradientTape() as tape:
        value = loss(adapted.network(x))
    a, b = changes[f"{target.key}/a"], changes[f"{target.key}/b"]
    got_a, got_b = tape.gradient(value, [a.value, b.value])
    if target.kind == "conv-transpose":
        kernel = np.moveaxis(kernel, -1, 0)
    flat_a = state[f"{target.key}/a"].reshape(-1, 2).astype(np.float64)
    flat_b = state[f"{target.key}/b"].reshape(2, -1).astype(np.float64)
    flat = 0.7 * kernel.reshape(len(flat_a), -1)
    np.testing.assert_allclose(got_a.numpy().reshape(flat_a.shape), flat @ flat_b.T, rtol=2e-3,
                               atol=2e-4 * np.abs(flat @ flat_b.T).max())  # fmt: skip
    np.testing.assert_allclose(got_b.numpy().reshape(flat_b.shape), flat_a.T @ flat, rtol=2e-3,
                               atol=2e-4 * np.abs(flat_a.T @ flat).max())  # fmt: skip


def train_a_little(adapted: AdaptedNetwork, steps: int = 4) -> None:
    x = inputs_for(adapted.network)
    truth = np.eye(3, dtype="float32")[np.random.default_rng(1).integers(0, 3, x.shape[:3])]

    def loss(y: object, p: object) -> object:
        return -keras.ops.mean(keras.ops.log(keras.ops.sum(y * p[..., :-1], axis=-1)))  # type: ignore[index, operator]

    adapted.trained.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss)
    for _ in range(steps):
        adapted.trained.train_on_batch(x, truth)


@pytest.mark.parametrize("where", ["all", "decoder", "encoder"])
def test_only_planned_arrays_move_and_batch_statistics_stay(where: str) -> None:
    keras.utils.set_random_seed(0)
    network = dafne_like()
    before = network.get_weights()
    plan = plan_for(network, where)
    adapted = AdaptedNetwork(network, plan)
    start = initial_state(plan, 0)
    adapted.write(start)
    train_a_little(adapted)
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    after = adapted.read()
    assert after.keys() == start.keys()
    # Every planned array gets a gradient: from the second step on also a, once b is not zero.
    assert all(not np.array_equal(after[key], start[key]) for key in start)


def test_training_then_folding_gives_the_adapted_network() -> None:
    keras.utils.set_random_seed(0)
    network = dafne_like()
    base = keras_weights(network.get_weights())
    plan = plan_for(network)
    adapted = AdaptedNetwork(network, plan)
    adapted.write(initial_state(plan, 0))
    train_a_little(adapted, 10)
    plain = dafne_like()
    folded = fold(base, plan, adapted.read())
    plain.set_weights([folded[key] for key in sorted(folded)])
    x = inputs_for(network)
    np.testing.assert_allclose(outputs(plain, x), adapted.predict(x), atol=1e-6)
    assert [w.shape for w in plain.get_weights()] == [a.shape for _, a in sorted(base.items())]


def test_state_travels_between_builds() -> None:
    networks = [dafne_like(), dafne_like()]
    networks[1].set_weights(networks[0].get_weights())
    plan = plan_for(networks[0])
    assert plan_for(networks[1]).state_shapes() == plan.state_shapes()
    first, second = (AdaptedNetwork(network, plan) for network in networks)
    first.write(random_state(plan))
    second.write(first.read())
    x = inputs_for(networks[0])
    np.testing.assert_array_equal(first.predict(x), second.predict(x))


def test_an_output_of_zero_does_not_make_the_loss_infinite() -> None:
    network = dafne_like()
    adapted = AdaptedNetwork(network, plan_for(network))
    head = [w.copy() for w in network.get_weights()]
    head[-1][:] = [1e4, 0, -1e4]  # softmax gives exact zeros
    network.set_weights(head)
    output = adapted.predict(inputs_for(network))
    assert output[..., :-1].min() > 0
    assert np.isfinite(np.log(output[..., :-1])).all()


def test_wrong_plans_and_states_are_named() -> None:
    network = dafne_like()
    plan = plan_for(network)
    odd = plan.targets[0].model_copy(update={"shape": (3, 3, 9, 9)})
    with pytest.raises(AdapterError, match=r"the plan expects shape \(3, 3, 9, 9\)"):
        AdaptedNetwork(network, plan.model_copy(update={"targets": (odd,)}))
    nowhere = Target(key="0999", layer="?", kind="delta", shape=(1,))
    with pytest.raises(AdapterError, match=r"no trainable weights \['0999'\]"):
        AdaptedNetwork(dafne_like(), plan.model_copy(update={"targets": (nowhere,)}))
    adapted = AdaptedNetwork(dafne_like(), plan)
    with pytest.raises(AdapterError, match="prepared for rank 2, got a state of rank 3"):
        adapted.write(initial_state(plan, 0, rank=3))
    with pytest.raises(StateError, match="missing"):
        adapted.write({})


def test_grouped_and_unknown_layers_are_refused_in_words() -> None:
    inputs = keras.Input((8, 8, 4))
    level = layers.Conv2D(4, 3, groups=2, padding="same")(inputs)
    level = layers.DepthwiseConv2D(3, padding="same")(level)
    network = keras.Model(inputs, layers.Conv2D(3, 1)(level))
    found = {layer.name: layer.refused for layer in describe_layers(network)}
    reasons = list(found.values())
    assert "grouped convolutions" in reasons[0]
    assert "DepthwiseConv2D" in reasons[1]
    with pytest.raises(AdapterError, match="grouped convolutions"):
        plan_for(network)


def check_upstream(network: "keras.Model", rebuilt: "keras.Model") -> None:
    """Merge equals adapted on a network of Dafne's own generators."""
    base = keras_weights(network.get_weights())
    plan = plan_for(network)
    x = inputs_for(network, 1)
    before = outputs(network, x)
    adapted = AdaptedNetwork(network, plan)
    adapted.write(initial_state(plan, 0))
    np.testing.assert_array_equal(outputs(adapted.network, x), before)
    state = {key: 0.1 * value for key, value in random_state(plan).items()}
    adapted.write(state)
    folded = fold(base, plan, state)
    rebuilt.set_weights([folded[key] for key in sorted(folded)])
    np.testing.assert_allclose(outputs(rebuilt, x), outputs(adapted.network, x), atol=1e-5)


def function_of(path: Path, name: str) -> str:
    (found,) = (
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return ast.unparse(found)


def build(source: str) -> "keras.Model":
    scope: dict[str, object] = {}
    exec(source, {}, scope)  # the checkout that the person who runs this names
    (function,) = scope.values()
    return function()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("file", "function"),
    [
        ("generate_thigh_split_model.py", "coscia_unet"),
        ("generate_leg_split_model.py", "gamba_unet"),
    ],
)
def test_dafnes_own_networks(request: pytest.FixtureRequest, file: str, function: str) -> None:
    checkout = request.config.getoption("--dafne-models")
    if not checkout:
        pytest.skip("give --dafne-models a checkout of Dafne's model generators to run this")
    source = function_of(Path(checkout) / file, function)
    network = build(source)
    assert len(network.get_weights()) == 188
    check_upstream(network, build(source))


def test_the_trainer_template_of_dafne(request: pytest.FixtureRequest) -> None:
    checkout = request.config.getoption("--dafne-models")
    if not checkout:
        pytest.skip("give --dafne-models a checkout of Dafne's model generators to run this")
    text = (Path(checkout) / "src/dafne_models/resources/generate_model.py.tmpl").read_text()
    for name, value in {
        "LABELS_DICT": "{1: 'a', 2: 'b'}",
        "MODEL_SIZE": "[64, 64]",
        "N_LEVELS": "4",
        "N_CONV_LAYERS": "2",
        "INITIAL_KERNEL_SIZE": "2",
    }.items():
        text = text.replace(f"%%{name}%%", value)
    source = text[text.index("def make_unet") : text.index("def model_apply")]
    check_upstream(build(source), build(source))


def test_our_thigh_geometry_is_that_of_dafnes_thigh_network() -> None:
    from dafne_federated.core.function_sources import thigh_spec

    network = build(thigh_spec().sources()["init_model_function"])
    # The counts of Dafne's own generator, see the test above.
    assert network.count_params() == 26_578_445
    assert len(network.get_weights()) == 188
    assert network.input_shape == (None, 250, 250, 2)
    assert network.output_shape == (None, 250, 250, 14)


@pytest.mark.parametrize(("size", "strides"), [(64, (2, 2, 2)), (50, (2, 3)), (45, (2, 2, 2))])
def test_our_own_networks_fold(size: int, strides: tuple[int, ...]) -> None:
    spec = NetworkSpec(
        labels=("a", "b"),
        size=size,
        resolution=(1.0, 1.0),
        filters=(4, 6, 8, 10)[: len(strides) + 1],
        strides=strides,
    )
    source = spec.sources()["init_model_function"]
    network = build(source)
    assert network.output_shape == (None, size, size, 4)
    check_upstream(network, build(source))
