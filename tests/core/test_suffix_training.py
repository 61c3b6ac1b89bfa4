"""Training with features from disk ends in the state that training without them ends in."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.function_sources import NetworkSpec  # noqa: E402
from dafne_federated.core.methods import Choices, plan_targets  # noqa: E402
from dafne_federated.core.model_file import keras_weights  # noqa: E402
from dafne_federated.core.network_layers import describe_layers  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.prefix_cache import PrefixCache  # noqa: E402
from dafne_federated.core.slices import PreparedSlices  # noqa: E402
from dafne_federated.core.state import check_state, fold, initial_state  # noqa: E402
from dafne_federated.core.suffix_network import without_skips  # noqa: E402
from dafne_federated.core.suffix_training import SuffixTraining  # noqa: E402
from dafne_federated.core.training import AdapterTraining  # noqa: E402


def adapted_network(where: str, rank: int = 2, method: str = "lora") -> AdaptedNetwork:
    keras.utils.set_random_seed(0)
    spec = NetworkSpec(
        labels=("a", "b"), size=16, resolution=(1.0, 1.0), filters=(4, 6), strides=(2,)
    )
    scope: dict[str, Any] = {}
    exec(spec.sources()["init_model_function"], scope)
    network = scope["init_model"]()
    targets = plan_targets(method, describe_layers(network), Choices(where=where))
    plan = AdaptationPlan(
        base_digest="0" * 64,
        method=method,
        rank=rank,
        max_rank=8,
        scale=1,
        labels=("a", "b"),
        targets=without_skips(network, targets) if where == "decoder" else targets,
    )
    adapted = AdaptedNetwork(network, plan)
    adapted.write(initial_state(plan, 0))
    return adapted


def loss(truth: Any, output: Any) -> Any:
    right = keras.ops.sum(truth * output[..., :-1], axis=-1)
    return -keras.ops.mean(output[..., -1] * keras.ops.log(right))


def some_slices(count: int = 7) -> PreparedSlices:
    generator = np.random.default_rng(1)
    shape = (count, 16, 16)
    images = generator.normal(size=shape).astype(np.float32)
    return PreparedSlices(
        images=images,
        labels=(images > 0).astype(np.uint8) + (images > 1),
        weights=generator.uniform(0.5, 1, shape).astype(np.float32),
        channels=3,
    )


@pytest.mark.parametrize("where", ["decoder", "all"])
def test_state_losses_and_steps_are_those_of_plain_training(tmp_path: Path, where: str) -> None:
    slices = some_slices()
    plain = adapted_network(where)
    expected = AdapterTraining(plain, loss).run(slices, 3, 2, 0.01, seed=4)
    for cache in (PrefixCache(tmp_path, 10), PrefixCache(tmp_path, 0), None):
        adapted = adapted_network(where)
        start = adapted.read()
        told: dict[int, float] = {}
        training = SuffixTraining(adapted, loss)
        found = training.run(slices, 3, 2, 0.01, 4, told.__setitem__, cache)
        assert list(told) == [1, 2, 3]
        assert found.steps == expected.steps == 9
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        state = adapted.read()
        assert max(np.abs(state[key] - start[key]).max() for key in state) > 0.01
        for key, array in plain.read().items():
            np.testing.assert_allclose(state[key], array, atol=2e-5)
        x = slices.inputs()
        np.testing.assert_allclose(adapted.predict(x), plain.predict(x), atol=1e-5)
    assert len(list(tmp_path.iterdir())) == (where == "decoder")


@pytest.mark.parametrize(
    ("where", "method"), [("decoder", "lora"), ("all", "lora"), ("all", "ssf"), ("all", "full")]
)
@pytest.mark.parametrize("room", [10, 0], ids=["cached", "uncached"])
def test_training_in_bfloat16_ends_near_training_in_float32(
    tmp_path: Path, where: str, method: str, room: int
) -> None:
    slices, states, outputs, losses = some_slices(), [], [], []
    for precision in ("float32", "bfloat16"):
        adapted = adapted_network(where, method=method)
        cache = PrefixCache(tmp_path, room)
        training = SuffixTraining(adapted, loss, precision)
        losses.append(training.run(slices, 3, 2, 0.003, 4, cache=cache).loss)
        states.append(adapted.read())
        check_state(adapted.plan, states[-1])
        outputs.append(adapted.predict(slices.inputs()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-2)
    changed = any(not np.array_equal(states[0][key], states[1][key]) for key in states[0])
    assert changed == (method == "lora")  # the others have no kernel to compute otherwise


def test_after_bfloat16_the_folded_model_computes_what_was_evaluated(tmp_path: Path) -> None:
    adapted = adapted_network("decoder")
    weights = keras_weights(adapted.network.get_weights())
    SuffixTraining(adapted, loss, "bfloat16").run(some_slices(), 2, 2, 0.01, 4)
    before = adapted.predict(some_slices().inputs())
    folded = fold(weights, adapted.plan, adapted.read())
    assert {array.dtype for array in folded.values()} == {np.dtype("float32")}
    plain = adapted_network("decoder")
    plain.network.set_weights([folded[key] for key in sorted(folded)])
    np.testing.assert_allclose(plain.predict(some_slices().inputs()), before, atol=2e-6)


def test_a_second_run_gives_the_same_bits(tmp_path: Path) -> None:
    adapted, cache = adapted_network("decoder"), PrefixCache(tmp_path, 10)
    training, start, states = SuffixTraining(adapted, loss), adapted.read(), []
    for _ in range(2):
        adapted.write(start)
        training.run(some_slices(), 2, 3, 0.01, 4, cache=cache)
        states.append(adapted.read())
    for key in start:
        np.testing.assert_array_equal(states[0][key], states[1][key])


def test_two_sites_with_other_slices_use_their_own_features(tmp_path: Path) -> None:
    adapted = adapted_network("decoder")
    training, start = SuffixTraining(adapted, loss), adapted.read()
    losses = []
    for name, count in (("one", 5), ("two", 7), ("one", 5)):
        adapted.write(start)
        cache = PrefixCache(tmp_path / name, 10)
        losses.append(training.run(some_slices(count), 1, 2, 0.01, 4, cache=cache).loss)
    assert losses[0] == losses[2] != losses[1]
    assert [len(list((tmp_path / name).iterdir())) for name in ("one", "two")] == [1, 1]


def test_the_rank_does_not_need_new_features(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PrefixCache(tmp_path, 10)
    with caplog.at_level(logging.INFO):
        for rank in (1, 3):
            training = SuffixTraining(adapted_network("decoder", rank), loss)
            training.run(some_slices(), 1, 2, 0.01, 4, cache=cache)
    assert caplog.text.count("prefix cache: keeping") == 1


def test_a_network_without_a_graph_is_trained_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from dafne_federated.core import network_graph

    monkeypatch.setattr(network_graph, "_has_graph", lambda _: False)
    adapted = adapted_network("all")
    with caplog.at_level(logging.INFO):
        training = SuffixTraining(adapted, loss)
    assert "training the network as it is: " in caplog.text
    plain = adapted_network("all")
    AdapterTraining(plain, loss).run(some_slices(), 1, 2, 0.01, 4)
    training.run(some_slices(), 1, 2, 0.01, 4, cache=PrefixCache(tmp_path, 10))
    for key, array in plain.read().items():
        np.testing.assert_array_equal(adapted.read()[key], array)


@pytest.mark.parametrize("graph", [True, False], ids=["suffix", "as-it-is"])
def test_a_factor_that_is_held_does_not_move_by_a_bit_and_the_rest_does(
    monkeypatch: pytest.MonkeyPatch, graph: bool
) -> None:
    from dafne_federated.core import network_graph

    if not graph:
        monkeypatch.setattr(network_graph, "_has_graph", lambda _: False)
    adapted, slices = adapted_network("all"), some_slices()
    before = adapted.read()
    for moving in ("b", "a", "both", "b"):
        adapted.train_factors(moving)  # in turn on one network, as alternating rounds do
        SuffixTraining(adapted, loss).run(slices, 1, 2, 0.01, 4)
        after = adapted.read()
        for key, value in after.items():
            held = key[-2:] in ("/a", "/b") and moving not in ("both", key[-1])
            assert np.array_equal(value, before[key]) == held, (moving, key)
        before = after
