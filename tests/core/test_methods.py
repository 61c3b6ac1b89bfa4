"""Laws that hold for every adaptation method, on networks with every kind of layer."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import AdapterError, StateError
from dafne_federated.core.methods import (
    METHODS,
    method_parts,
    method_words,
    plan_targets,
)
from dafne_federated.core.model_file import Weights, keras_weights
from dafne_federated.core.plan import AdaptationPlan, Layer
from dafne_federated.core.state import (
    State,
    check_state,
    fold,
    initial_state,
    load_state,
    save_state,
    state_bytes,
)
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update

keras = pytest.importorskip("keras")
layers = keras.layers

COMBINED = (
    "lora+norm",
    "lora+norm+head",
    "lora+decoder",
    "head+norm",
    "encoder+head",
    "ssf+last-k",
)


def unet() -> "keras.Model":
    """Every kind of layer of Dafne's own networks: transposed, normalised, without a bias."""
    inputs = keras.Input((12, 12, 2))
    skip = layers.Conv2D(4, 3, padding="same", kernel_regularizer="l2")(inputs)
    skip = layers.Activation("relu")(layers.BatchNormalization()(skip))
    level = layers.Conv2D(6, 2, strides=2, activation="relu")(skip)
    level = layers.Conv2DTranspose(4, 2, strides=2)(level)
    level = layers.BatchNormalization(scale=False)(level)
    level = layers.Concatenate()([skip, layers.Activation("tanh")(level)])
    level = layers.Conv2D(4, 3, padding="same", use_bias=False)(level)
    level = layers.Activation("tanh")(layers.BatchNormalization()(level))
    return keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax")(level))


def volumes() -> "keras.Model":
    inputs = keras.Input((4, 6, 6, 1))
    level = layers.Conv3D(3, 3, padding="same", activation="tanh")(inputs)
    level = layers.Conv3D(4, 2, strides=2, use_bias=False)(level)
    level = layers.BatchNormalization()(level)
    level = layers.Conv3DTranspose(3, 2, strides=2, activation="tanh")(level)
    return keras.Model(inputs, layers.Conv3D(2, 1, activation="softmax")(level))


def vectors() -> "keras.Model":
    inputs = keras.Input((9, 2))
    level = layers.Conv1D(4, 3, activation="tanh")(inputs)
    level = layers.Conv1DTranspose(3, 2, strides=2)(level)
    level = layers.Dense(5, activation="tanh")(layers.Flatten()(level))
    level = layers.BatchNormalization()(layers.Dense(4, use_bias=False)(level))
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(level))


def grouped() -> "keras.Model":
    """What no low-rank pair fits, nested, and an upsampling in place of a transposed one."""
    inner = keras.Input((8, 8, 4))
    level = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(inner)
    level = layers.PReLU(shared_axes=[1, 2])(layers.GroupNormalization(2)(level))
    block = keras.Model(inner, layers.Conv2D(4, 3, groups=2, padding="same")(level))
    inputs = keras.Input((8, 8, 2))
    level = block(layers.Conv2D(4, 1, activation="tanh")(inputs))
    level = layers.UpSampling2D(2)(layers.LayerNormalization()(level))
    level = layers.SeparableConv2D(4, 3, padding="same")(level)
    level = layers.Conv2D(4, 3, padding="same", activation="tanh")(level)
    return keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax")(level))


NETWORKS = {"unet": unet, "volumes": volumes, "vectors": vectors, "grouped": grouped}
CASES = [
    *itertools.product(NETWORKS, METHODS),
    *itertools.product(("unet", "grouped"), COMBINED),
]


def built(name: str) -> "keras.Model":
    """The network with statistics and shifts that are not their neutral first values."""
    keras.utils.set_random_seed(3)
    network = NETWORKS[name]()
    generator = np.random.default_rng(4)
    network.set_weights(
        [w + generator.uniform(0.05, 0.3, w.shape).astype("float32") for w in network.get_weights()]
    )
    return network


@cache
def known(name: str) -> tuple[list[Layer], Weights]:
    """What the tests need to know of a network without building it again."""
    from dafne_federated.core.network_layers import describe_layers

    network = built(name)
    return describe_layers(network), keras_weights(network.get_weights())


def plan_for(network: str | list[Layer], method: str) -> AdaptationPlan:
    return AdaptationPlan(
        base_digest="0" * 64,
        method=method,
        rank=2,
        max_rank=8,
        scale=0.7,
        labels=("a", "b"),
        targets=plan_targets(method, known(network)[0] if isinstance(network, str) else network),
    )


def random_state(plan: AdaptationPlan, seed: int = 5) -> State:
    generator = np.random.default_rng(seed)
    return {
        key: (0.2 * generator.normal(size=shape)).astype("float32")
        for key, shape in plan.state_shapes().items()
    }


def run(network: "keras.Model") -> np.ndarray:
    shape = (3, *network.input_shape[1:])
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    return np.asarray(network(x, training=False))


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, backend: None) -> tuple[str, AdaptationPlan]:
    """A network and the plan of a method on it; every method fits Dafne's kind of network."""
    network, method = request.param
    try:
        return network, plan_for(network, method)
    except AdapterError as error:
        assert network != "unet"
        pytest.skip(str(error))


slow = pytest.mark.slow


@slow
def test_fresh_changes_nothing_and_folded_is_adapted(case: tuple[str, AdaptationPlan]) -> None:
    from dafne_federated.core.adapters import AdaptedNetwork

    name, plan = case
    network = built(name)
    base, before = keras_weights(network.get_weights()), run(network)
    adapted = AdaptedNetwork(network, plan)
    adapted.write(initial_state(plan, 0))
    np.testing.assert_array_equal(run(adapted.network), before)
    fresh = fold(base, plan, initial_state(plan, 0))
    assert all(np.array_equal(fresh[key], base[key]) for key in base)

    state = random_state(plan)
    adapted.write(state)
    after = run(adapted.network)
    assert np.abs(after - before).max() > 1e-3
    folded = fold(base, plan, state)
    plain = built(name)
    plain.set_weights([folded[key] for key in sorted(folded)])
    np.testing.assert_allclose(run(plain), after, atol=1e-6)


@slow
def test_only_planned_arrays_move_and_are_counted(case: tuple[str, AdaptationPlan]) -> None:
    from dafne_federated.core.adapters import AdaptedNetwork

    name, plan = case
    network = built(name)
    before = keras_weights(network.get_weights())
    statistics = {
        f"{index:04d}"
        for index, variable in enumerate(network.weights)
        if variable.name.startswith("moving")
    }
    adapted = AdaptedNetwork(network, plan)
    start = initial_state(plan, 0)
    adapted.write(start)
    train(adapted)
    for key, array in keras_weights(network.get_weights()).items():
        np.testing.assert_array_equal(array, before[key])
    after = adapted.read()
    check_state(plan, after)
    # Every planned array gets a gradient: from the second step on also a, once b is not zero.
    assert [key for key in start if np.array_equal(after[key], start[key])] == []
    folded = fold(before, plan, after)
    moved = {key for key in before if not np.array_equal(folded[key], before[key])}
    assert plan.parameters == sum(array.size for array in after.values())
    assert plan.wire_bytes == sum(array.nbytes for array in after.values())
    assert moved == {target.key for target in plan.targets}
    assert not moved & statistics


def train(adapted: object, steps: int = 3) -> None:
    network = adapted.network  # type: ignore[attr-defined]
    x = np.random.default_rng(1).normal(size=(2, *network.input_shape[1:])).astype("float32")
    classes = network.output_shape[-1]
    truth = np.random.default_rng(2).integers(0, classes, (2, *network.output_shape[1:-1]))
    truth = np.eye(classes, dtype="float32")[truth]
    optimizer = keras.optimizers.Adam(0.01)
    trained = adapted.trained  # type: ignore[attr-defined]
    trained.compile(optimizer, loss=lambda y, p: keras.ops.mean((y - p) ** 2), run_eagerly=True)
    for _ in range(steps):
        trained.train_on_batch(x, truth)


@slow
def test_a_state_and_its_plan_survive_the_disk(
    case: tuple[str, AdaptationPlan], tmp_path: Path
) -> None:
    _, plan = case
    assert AdaptationPlan.from_json(plan.to_json()) == plan
    state = random_state(plan)
    save_state(tmp_path / "state.npz", plan, state)
    back_plan, back = load_state(tmp_path / "state.npz")
    assert back_plan == plan
    assert state_bytes(plan, back) == state_bytes(plan, state)


# Those that take whole states; the laws of all strategies are in tests/strategies.
@slow
@pytest.mark.parametrize("strategy", ["fedavg", "factors", "product"])
def test_states_can_be_averaged(case: tuple[str, AdaptationPlan], strategy: str) -> None:
    name, plan = case
    _, base = known(name)
    state = random_state(plan)
    if strategy == "fedavg" and any(target.low_rank for target in plan.targets):
        with pytest.raises(StateError, match="low-rank pairs"):
            STRATEGIES[strategy](plan, [Update("one", state, 3)])
        return
    alone = STRATEGIES[strategy](plan, [Update("one", state, 3)])
    assert state_bytes(plan, alone.state) == state_bytes(plan, state)
    equal = STRATEGIES[strategy](plan, [Update(str(i), state, i + 1) for i in range(3)])
    assert equal.error < 1e-6
    want, got = fold(base, plan, state), fold(base, plan, equal.state)
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=1e-6)
    others = [Update(str(i), random_state(plan, i), i + 1) for i in range(3)]
    mean = STRATEGIES[strategy](plan, others).state
    check_state(plan, mean)
    for key in mean:
        if key.endswith(("/delta", "/scale")):
            parts = [update.state[key].astype(float) for update in others]
            np.testing.assert_allclose(mean[key], np.average(parts, 0, [1, 2, 3]), atol=1e-6)


@slow
def test_the_head_is_trained_whole_unless_the_method_says_otherwise(
    case: tuple[str, AdaptationPlan],
) -> None:
    name, plan = case
    last = len(known(name)[1]) - 1
    whole = {target.key for target in plan.targets if target.kind == "delta"}
    trains_head = any(METHODS[part].head for part in method_parts(plan.method))
    assert trains_head == ({f"{last - 1:04d}", f"{last:04d}"} <= whole)
    assert trains_head != method_words(plan.method).endswith("the head's kernel stays")


@slow
def test_full_trains_every_trainable_weight(backend: None) -> None:
    for name in NETWORKS:
        network = built(name)
        trainable = {id(variable) for variable in network.trainable_variables}
        want = {f"{i:04d}" for i, v in enumerate(network.weights) if id(v) in trainable}
        assert {target.key for target in plan_for(name, "full").targets} == want


@slow
def test_ssf_is_the_scale_and_shift_of_the_features(backend: None) -> None:
    """With s = g - 1 and d = s b + h, features y of a layer become g y + h."""
    from dafne_federated.core.network_layers import describe_layers

    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 5, 3))
    network = keras.Model(
        inputs, layers.Conv2D(2, 1)(layers.Conv2DTranspose(4, 3, strides=2)(inputs))
    )
    generator = np.random.default_rng(1)
    network.set_weights([generator.normal(size=w.shape) for w in network.get_weights()])
    base = keras_weights(network.get_weights())
    plan = plan_for(describe_layers(network), "ssf")
    gain, shift = generator.normal(size=(2, 4)).astype("float32")
    state = initial_state(plan, 0)
    state["0000/scale"] = gain[:, None] - 1
    state["0001/delta"] = (gain - 1) * base["0001"] + shift
    x = generator.normal(size=(1, 5, 5, 3)).astype("float32")
    features = np.asarray(network.layers[1](x))
    folded = fold(base, plan, state)
    network.set_weights([folded[key] for key in sorted(folded)])
    np.testing.assert_allclose(network.layers[1](x), gain * features + shift, atol=1e-5)


@slow
def test_a_second_plan_takes_the_place_of_the_first(backend: None) -> None:
    from dafne_federated.core.adapters import AdaptedNetwork

    network = built("unet")
    before = run(network)
    first = AdaptedNetwork(network, plan_for("unet", "full"))
    first.write(random_state(first.plan))
    second = AdaptedNetwork(network, plan_for("unet", "full"))
    np.testing.assert_array_equal(run(second.network), before)
