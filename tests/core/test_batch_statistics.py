"""Statistics measured layer by layer: exact over sites, folded, used by every path, and a cure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.batch_statistics import (  # noqa: E402
    measure,
    recalibrate,
    statistic_targets,
)
from dafne_federated.core.errors import AdapterError, StateError  # noqa: E402
from dafne_federated.core.function_sources import NetworkSpec  # noqa: E402
from dafne_federated.core.methods import Choices, plan_targets  # noqa: E402
from dafne_federated.core.model_file import (  # noqa: E402
    Weights,
    keras_weights,
    read_model,
)
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.core.moments import pool_moments, statistics_change  # noqa: E402
from dafne_federated.core.network_layers import describe_layers  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.prefix_cache import PrefixCache  # noqa: E402
from dafne_federated.core.slices import PreparedSlices, concatenate  # noqa: E402
from dafne_federated.core.state import State, fold, initial_state  # noqa: E402
from dafne_federated.core.suffix_training import SuffixTraining  # noqa: E402
from dafne_federated.core.training import AdapterTraining, slice_dice  # noqa: E402


def fresh_network() -> Any:
    keras.utils.set_random_seed(0)
    spec = NetworkSpec(
        labels=("a", "b"), size=16, resolution=(1.0, 1.0), filters=(4, 6), strides=(2,)
    )
    scope: dict[str, Any] = {}
    exec(spec.sources()["init_model_function"], scope)
    return scope["init_model"]()


def plan_for(network: Any, method: str = "lora", where: str = "decoder") -> AdaptationPlan:
    targets = plan_targets(method, describe_layers(network), Choices(where=where))
    targets += statistic_targets(network)
    return AdaptationPlan(
        base_digest="0" * 64,
        method=method,
        rank=2,
        max_rank=8,
        scale=1,
        labels=("a", "b"),
        targets=tuple(sorted(targets, key=lambda target: target.key)),
    )


@pytest.fixture
def base() -> Weights:
    return keras_weights(fresh_network().get_weights())


@pytest.fixture
def adapted() -> AdaptedNetwork:
    network = fresh_network()
    return AdaptedNetwork(network, plan_for(network))


def some_slices(seed: int, count: int, offset: float = 0.0) -> PreparedSlices:
    generator = np.random.default_rng(seed)
    shape = (count, 16, 16)
    images = np.cumsum(generator.normal(size=shape), axis=1).astype(np.float32) + offset
    return PreparedSlices(
        images=images,
        labels=(images > 0).astype(np.uint8) + (images > 1),
        weights=generator.uniform(0.5, 1, shape).astype(np.float32),
        channels=3,
    )


def loss(truth: Any, output: Any) -> Any:
    right = keras.ops.sum(truth * output[..., :-1], axis=-1)
    return -keras.ops.mean(output[..., -1] * keras.ops.log(right))


def test_targets_are_all_statistics_in_pairs() -> None:
    network = fresh_network()
    found = plan_for(network).normalisations
    names = [network.weights[int(target.key)].name for pair in found for target in pair]
    assert names == ["moving_mean", "moving_variance"] * len(found)
    assert len(found) == sum(w.name == "moving_mean" for w in network.weights) > 5


def test_sites_together_are_one_site_with_all_slices(
    adapted: AdaptedNetwork, base: Weights
) -> None:
    sites = [some_slices(0, 5), some_slices(1, 2, offset=3), some_slices(2, 9)]
    start = initial_state(adapted.plan, 0)
    alone = recalibrate(adapted, base, start, concatenate(sites))
    state = dict(start)
    for mean, variance in adapted.plan.normalisations:
        adapted.write(state)
        pooled = pool_moments([measure(adapted, mean, site) for site in sites])
        assert pooled.count == 16
        state |= statistics_change(mean, variance, (base[mean.key], base[variance.key]), pooled)
    assert max(np.abs(alone[key]).max() for key in adapted.plan.state_shapes(trained=False)) > 0.1
    for key, array in alone.items():
        np.testing.assert_allclose(state[key], array, rtol=1e-5, atol=1e-6)


def test_they_are_those_of_a_network_that_normalises_by_all_slices_at_once(
    adapted: AdaptedNetwork, base: Weights
) -> None:
    slices = some_slices(0, 6)
    state = recalibrate(adapted, base, initial_state(adapted.plan, 0), slices)
    found = fold(base, adapted.plan, state)
    other = fresh_network()
    for layer in other.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # what is stored is what Keras itself finds in this one batch
    other(slices.inputs(), training=True)
    for key, array in keras_weights(other.get_weights()).items():
        np.testing.assert_allclose(found[key], array, rtol=1e-4, atol=1e-5)


def test_the_same_slices_give_the_same_bits_in_any_company(adapted: AdaptedNetwork) -> None:
    slices, (first, *_) = some_slices(0, 7), adapted.plan.normalisations
    adapted.write(initial_state(adapted.plan, 0))
    one, two = (measure(adapted, first[0], slices) for _ in range(2))
    assert one.mean.tobytes() == two.mean.tobytes()
    assert one.variance.tobytes() == two.variance.tobytes()


@pytest.mark.parametrize("method", ["lora", "norm", "full"])
def test_the_merged_network_computes_what_the_adapted_one_does(base: Weights, method: str) -> None:
    network = fresh_network()
    adapted = AdaptedNetwork(network, plan_for(network, method, "all"))
    slices = some_slices(0, 6)
    state = recalibrate(adapted, base, initial_state(adapted.plan, 0), slices)
    generator = np.random.default_rng(5)
    for key, shape in adapted.plan.state_shapes(trained=True).items():
        state[key] = state[key] + 0.05 * generator.normal(size=shape).astype(np.float32)
    adapted.write(state)
    merged = fresh_network()
    before = merged.predict_on_batch(slices.inputs())
    folded = fold(base, adapted.plan, state)
    merged.set_weights([folded[key] for key in sorted(folded)])
    after = merged.predict_on_batch(slices.inputs())
    assert np.abs(after - before).max() > 0.05
    np.testing.assert_allclose(adapted.predict(slices.inputs()), after, atol=1e-5)
    back = adapted.read()
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in state.items()}


@pytest.mark.parametrize("cached", [True, False])
def test_a_suffix_that_was_cut_off_before_follows_the_new_statistics(
    tmp_path: Path, base: Weights, cached: bool
) -> None:
    slices, cache = some_slices(0, 6), PrefixCache(tmp_path, 10) if cached else None
    results: list[State] = []
    for plain in (True, False):
        network = fresh_network()
        adapted = AdaptedNetwork(network, plan_for(network))
        start = initial_state(adapted.plan, 0)
        state = recalibrate(adapted, base, start, slices)
        if plain:
            AdapterTraining(adapted, loss).run(slices, 2, 2, 0.01, 4)
        else:
            adapted.write(start)
            training = SuffixTraining(adapted, loss)
            training.run(slices, 1, 2, 0.01, 4, cache=cache)
            adapted.write(state)
            training.run(slices, 2, 2, 0.01, 4, cache=cache)
        results.append(adapted.read())
        for key in adapted.plan.state_shapes(trained=False):
            np.testing.assert_array_equal(results[-1][key], state[key])
    moved = max(np.abs(results[0][key] - start[key]).max() for key in start if "/a" in key)
    assert moved > 0.01
    for key, array in results[0].items():
        np.testing.assert_allclose(results[1][key], array, atol=2e-5)


def test_statistics_that_lag_behind_are_made_good(trained: Any, make_case: Any) -> None:
    model = RunningModel(read_model(trained.path), trained.approvals)
    training, unseen = (
        model.prepare_all(iter([make_case(f"p{n}", n) for n in seeds]))
        for seeds in ((0, 1, 2), (20, 21))
    )
    whole = slice_dice(model.network.predict_on_batch, unseen)
    lagging = {
        # a twentieth of the way from a new network's 0 and 1 to those of the data
        "moving_mean": lambda values: 0.05 * values,
        "moving_variance": lambda values: 0.95 + 0.05 * values,
    }
    for variable in model.network.weights:
        if change := lagging.get(variable.name):
            variable.assign(change(variable.numpy()))
    base = keras_weights(model.network.get_weights())
    targets = plan_targets("head", describe_layers(model.network))
    targets += statistic_targets(model.network)
    plan = AdaptationPlan(
        base_digest="0" * 64, method="head", rank=1, max_rank=1, scale=1, labels=model.labels,
        targets=tuple(sorted(targets, key=lambda target: target.key)),
    )  # fmt: skip
    adapted = AdaptedNetwork(model.network, plan)
    start = initial_state(plan, 0)
    adapted.write(start)
    assert slice_dice(adapted.predict, unseen) < whole - 0.2
    recalibrate(adapted, base, start, training)
    assert slice_dice(adapted.predict, unseen) > whole - 0.03


def test_a_negative_variance_is_written_nowhere(adapted: AdaptedNetwork, base: Weights) -> None:
    start = initial_state(adapted.plan, 0)
    adapted.write(start)
    variance = adapted.plan.normalisations[0][1]
    bad = start | {f"{variance.key}/delta": np.full(variance.shape, -1.5, np.float32)}
    for use in (adapted.write, lambda state: fold(base, adapted.plan, state)):
        with pytest.raises(StateError, match="expected variances of at least 0"):
            use(bad)
    np.testing.assert_array_equal(adapted.read()[f"{variance.key}/delta"], 0)


def two_uses() -> Any:
    inputs = keras.Input((8, 8, 2))
    norm = keras.layers.BatchNormalization()
    level = norm(norm(inputs))
    return keras.Model(inputs, keras.layers.Conv2D(2, 1)(level))


def no_norm() -> Any:
    inputs = keras.Input((8, 8, 2))
    return keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs))


@pytest.mark.parametrize(
    ("network", "words"),
    [(two_uses, "a later weight|used once"), (no_norm, "no normalisation with stored statistics")],
)
def test_networks_whose_statistics_cannot_be_set_are_refused(network: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        statistic_targets(network())


def test_a_plan_for_another_network_is_refused(adapted: AdaptedNetwork) -> None:
    first = adapted.plan.normalisations[0][0]
    wrong = [
        t.model_copy(update={"key": "0000"}) if t.key == first.key else t
        for t in adapted.plan.targets
    ]
    plan = adapted.plan.model_copy(update={"targets": tuple(wrong)})
    with pytest.raises(AdapterError, match="the plan expects moving_mean"):
        AdaptedNetwork(fresh_network(), plan)
