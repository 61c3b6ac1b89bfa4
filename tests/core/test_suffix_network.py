"""A suffix on features gives the outputs, gradients and trained states of the whole network."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.errors import AdapterError  # noqa: E402
from dafne_federated.core.function_sources import NetworkSpec  # noqa: E402
from dafne_federated.core.methods import Choices, plan_targets  # noqa: E402
from dafne_federated.core.model_file import keras_weights  # noqa: E402
from dafne_federated.core.network_graph import read_graph  # noqa: E402
from dafne_federated.core.network_layers import describe_layers  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.state import State, fold  # noqa: E402
from dafne_federated.core.suffix_network import SuffixNetwork, without_skips  # noqa: E402

layers = keras.layers


def normal_form() -> "keras.Model":
    """Our own network: residual levels, skip connections, normalisation after each kernel."""
    spec = NetworkSpec(
        labels=("a", "b"), size=18, resolution=(1.0, 1.0), filters=(4, 34, 6), strides=(2, 3)
    )
    scope: dict[str, object] = {}
    exec(spec.sources()["init_model_function"], scope)
    return scope["init_model"]()  # type: ignore[operator]


def odd_form() -> "keras.Model":
    """What our own network has not: nesting, dropout, shared layers, other orders and kinds."""
    inputs = keras.Input((12, 12, 2))
    image = layers.Lambda(lambda both: both[..., 0:1])(inputs)
    weight_map = layers.Lambda(lambda both: both[..., 1:2])(inputs)
    skip = layers.Conv2D(3, 3, padding="same", activation="relu")(image)
    skip = layers.BatchNormalization()(skip)  # behind an activation
    down = layers.DepthwiseConv2D(3, strides=2, padding="same")(layers.Dropout(0.9)(skip))
    down = layers.Conv2D(5, 1, use_bias=False)(down)

    enter = keras.Input((6, 6, 5))
    level = layers.Conv2DTranspose(4, 3, strides=2, padding="same", use_bias=False)(enter)
    level = layers.BatchNormalization(scale=False)(level)
    up = keras.Model(enter, layers.Activation("relu")(level), name="up")(down)

    level = layers.Concatenate()([up, skip, image])
    level = layers.Conv2D(4, 3, padding="same", dilation_rate=2)(level)
    level = layers.BatchNormalization(center=False, epsilon=0.01)(level)
    twice = layers.Conv2D(4, 3, padding="same")
    other = twice(layers.Dropout(0.9)(level))
    level = layers.Add()([layers.BatchNormalization()(other), other])  # read by two
    level = layers.Concatenate()([skip, twice(level), skip])
    level = layers.Dense(6, activation="tanh")(level)
    level = layers.Conv2D(3, 1)(level)
    level = layers.Lambda(lambda x: keras.ops.softmax(x, axis=-1))(level)
    return keras.Model(inputs, layers.Concatenate()([level, weight_map]))


NETWORKS = {"normal": normal_form, "odd": odd_form}
METHODS = ("lora", "lora decoder", "lora decoder without skips", "head", "last-k", "decoder",
           "norm", "ssf", "lora+norm", "full")  # fmt: skip


def network_of(form: str) -> "keras.Model":
    """Build a network; its normalisations have statistics, scales and shifts to be folded."""
    keras.utils.set_random_seed(0)
    network = NETWORKS[form]()
    generator = np.random.default_rng(3)
    for variable in network.weights:
        if variable.name != "kernel":
            variable.assign(variable + generator.uniform(-0.4, 0.4, variable.shape))
    return network


def adapted_of(form: str, method: str, seed: int = 5) -> AdaptedNetwork:
    """Attach a plan, and write a state that changes something."""
    network = network_of(form)
    name, _, rest = method.partition(" ")
    where = "decoder" if "decoder" in rest else "all"
    targets = plan_targets(name, describe_layers(network), Choices(where=where))
    if "without skips" in rest:
        targets = without_skips(network, targets)
    plan = AdaptationPlan(
        base_digest="0" * 64,
        method=name,
        rank=2,
        max_rank=2,
        scale=0.7,
        labels=("a", "b"),
        targets=targets,
    )
    adapted = AdaptedNetwork(network, plan)
    adapted.write(random_state(plan, seed))
    return adapted


def random_state(plan: AdaptationPlan, seed: int) -> State:
    generator = np.random.default_rng(seed)
    return {
        key: (0.1 * generator.normal(size=shape)).astype("float32")
        for key, shape in plan.state_shapes().items()
    }


def inputs_for(network: "keras.Model", count: int = 3) -> np.ndarray:
    shape = (count, *network.input_shape[1:])
    return np.random.default_rng(0).uniform(0, 1, shape).astype("float32")


def loss(truth: object, output: object) -> object:
    right = keras.ops.sum(truth * output[..., :-1], axis=-1)  # type: ignore[operator, index]
    return -keras.ops.mean(output[..., -1] * keras.ops.log(right))  # type: ignore[index, operator]


def truth_for(inputs: np.ndarray) -> np.ndarray:
    labels = np.random.default_rng(1).integers(0, 3, inputs.shape[:3])
    return np.eye(3, dtype="float32")[labels]


@pytest.mark.parametrize("form", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_the_whole_network(method: str, form: str) -> None:
    adapted = adapted_of(form, method)
    check_outputs_and_gradients(adapted, SuffixNetwork(adapted))


@pytest.mark.parametrize("form", NETWORKS)
def test_they_are_the_same_where_nothing_is_cut_off(form: str) -> None:
    adapted = adapted_of(form, "lora decoder without skips")
    suffix = SuffixNetwork(adapted, saved=False)
    assert suffix.shapes == (adapted.network.input_shape[1:],)
    check_outputs_and_gradients(adapted, suffix)


def check_outputs_and_gradients(adapted: AdaptedNetwork, suffix: SuffixNetwork) -> None:
    import tensorflow as tf

    x = inputs_for(adapted.network)
    features = suffix.features(x)
    assert [f.shape[1:] for f in features] == list(suffix.shapes)
    assert suffix.slice_bytes == sum(f.nbytes for f in features) // len(x)
    expected = adapted.predict(x)
    assert expected.std(axis=(0, 1, 2)).min() > 0.005
    np.testing.assert_allclose(suffix.trained.predict_on_batch(features), expected, atol=2e-6)
    variables = {key: v.value for key, v in adapted.trained.changes.items()}
    gradients = []
    for network, given in ((adapted.trained, x), (suffix.trained, features)):
        with tf.GradientTape() as tape:
            value = loss(truth_for(x), network(given, training=True))
        gradients.append(tape.gradient(value, variables))
    for key in variables:
        whole, cut = (g[key].numpy() for g in gradients)
        assert np.abs(whole).max() > 0
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max() + 1e-9)


@pytest.mark.parametrize("form", NETWORKS)
@pytest.mark.parametrize("method", ["lora decoder without skips", "lora+norm", "last-k"])
def test_training_the_suffix_is_training_the_network(method: str, form: str) -> None:
    states = []
    for cut in (False, True):
        adapted = adapted_of(form, method)
        start = adapted.read()
        x = inputs_for(adapted.network)
        network, given = adapted.trained, x
        if cut:
            suffix = SuffixNetwork(adapted)
            network, given = suffix.trained, suffix.features(x)
        network.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss)
        before = adapted.network.get_weights()
        for _ in range(6):
            network.train_on_batch(given, truth_for(x))
        for old, new in zip(before, adapted.network.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)
        states.append(adapted.read())
    assert max(np.abs(states[0][key] - start[key]).max() for key in start) > 0.01
    for key in start:
        np.testing.assert_allclose(states[1][key], states[0][key], atol=2e-5)


@pytest.mark.parametrize("form", NETWORKS)
def test_pairs_without_skips_fold_with_zeros_for_the_skips(form: str) -> None:
    adapted = adapted_of(form, "lora decoder without skips")
    narrowed = [target for target in adapted.plan.targets if target.inputs]
    assert len(narrowed) == 2
    assert adapted.plan.parameters < adapted_of(form, "lora decoder").plan.parameters
    base = keras_weights(adapted.network.get_weights())
    folded = fold(base, adapted.plan, adapted.read())
    for target in narrowed:
        first, end = target.inputs or (0, 0)
        change = folded[target.key] - base[target.key]
        assert np.abs(change[..., first:end, :]).max() > 0
        untouched = np.delete(change, np.s_[first:end], axis=-2)
        assert untouched.size
        assert not untouched.any()
    plain = NETWORKS[form]()
    plain.set_weights([folded[key] for key in sorted(folded)])
    x = inputs_for(plain)
    np.testing.assert_allclose(plain.predict_on_batch(x), adapted.predict(x), atol=2e-6)


def test_a_skip_that_only_a_frozen_kernel_reads_is_summed_up_beforehand() -> None:
    whole = SuffixNetwork(adapted_of("normal", "lora decoder"))
    without = SuffixNetwork(adapted_of("normal", "lora decoder without skips"))
    numbers = []
    for network in (whole, without):
        prefix, suffix = network.trained._cut.prefix, network.trained._cut.suffix
        numbers.append(len({id(s.layer) for s in prefix} & {id(s.layer) for s in suffix}))
        assert not any(isinstance(s.layer, layers.BatchNormalization) for s in suffix)
    assert numbers == [1, 3]  # the first trained layer, then also both that read a skip


def test_where_the_first_layer_is_trained_the_whole_network_is_the_suffix() -> None:
    adapted = adapted_of("normal", "lora")
    suffix = SuffixNetwork(adapted)
    assert not suffix.saved
    assert suffix.shapes == ((18, 18, 2),)
    x = inputs_for(adapted.network)
    (feature,) = suffix.features(x)
    assert feature is x


def test_three_dimensions() -> None:
    inputs = keras.Input((4, 4, 4, 2))
    skip = layers.Conv3D(3, 3, padding="same")(inputs)
    level = layers.Conv3DTranspose(2, 2, strides=2)(layers.Conv3D(4, 2, strides=2)(skip))
    level = layers.Concatenate()([skip, layers.BatchNormalization()(level)])
    level = layers.BatchNormalization()(layers.Conv3D(3, 3, padding="same")(level))
    network = keras.Model(inputs, layers.Activation("softmax")(layers.Conv3D(4, 1)(level)))
    targets = plan_targets("lora", describe_layers(network), Choices(where="decoder"))
    plan = AdaptationPlan(
        base_digest="0" * 64,
        method="lora",
        rank=2,
        max_rank=2,
        scale=1,
        labels=("a",),
        targets=without_skips(network, targets),
    )
    adapted = AdaptedNetwork(network, plan)
    adapted.write(random_state(plan, 1))
    suffix = SuffixNetwork(adapted)
    x = inputs_for(network)
    np.testing.assert_allclose(
        suffix.trained.predict_on_batch(suffix.features(x)), adapted.predict(x), atol=2e-6
    )


def test_the_digest_of_the_weights_follows_the_statistics_too() -> None:
    adapted = adapted_of("normal", "head")
    before = SuffixNetwork(adapted).weights_digest
    assert SuffixNetwork(adapted_of("normal", "head")).weights_digest == before
    norm = next(x for x in adapted.network.layers if isinstance(x, layers.BatchNormalization))
    norm.moving_mean.assign(norm.moving_mean + 1)
    assert SuffixNetwork(adapted).weights_digest != before


def test_a_network_without_a_graph_is_refused_in_words() -> None:
    class Own(keras.Model):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.head = layers.Dense(3)

        def call(self, x: object) -> object:
            return self.head(x)

    network = Own()
    network(np.zeros((1, 4), "float32"))
    assert without_skips(network, ()) == ()  # nothing is known of its skips, so targets stay
    with pytest.raises(AdapterError, match="not a graph of layers"):
        read_graph(network)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_other_backends_of_keras_train_the_same(name: str) -> None:
    pytest.importorskip(name)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, test_suffix_network as t
from dafne_federated.core.suffix_network import SuffixNetwork
assert t.keras.backend.backend() == {name!r}
adapted = t.adapted_of("normal", "lora decoder without skips")
start, x, states = adapted.read(), t.inputs_for(adapted.network), []
suffix = SuffixNetwork(adapted)
for network, given in ((adapted.trained, x), (suffix.trained, suffix.features(x))):
    adapted.write(start)
    network.compile(optimizer=t.keras.optimizers.Adam(0.01), loss=t.loss)
    for _ in range(4):
        network.train_on_batch(given, t.truth_for(x))
    states.append(adapted.read())
assert max(np.abs(states[0][k] - start[k]).max() for k in start) > 0.01
for k in start:
    np.testing.assert_allclose(states[1][k], states[0][k], atol=2e-5)
"""
    environment = {**os.environ, "KERAS_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.parametrize("form", NETWORKS)
def test_in_bfloat16_outputs_are_near_and_the_weight_map_is_exact(form: str) -> None:
    adapted = adapted_of(form, "lora decoder without skips")
    inputs = np.random.default_rng(2).normal(size=(3, *adapted.network.input_shape[1:]))
    whole = adapted.predict(inputs)
    cut = SuffixNetwork(adapted, precision="bfloat16")
    features = cut.features(inputs.astype(np.float32))
    for feature, other in zip(
        features, SuffixNetwork(adapted).features(inputs.astype(np.float32)), strict=True
    ):
        np.testing.assert_array_equal(feature, other)
    found = np.asarray(cut.trained.predict_on_batch(features))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[..., -1], whole[..., -1])
    np.testing.assert_allclose(found, whole, atol=2e-2)
    assert np.abs(found - whole).max() > 1e-5  # it did compute in bfloat16
