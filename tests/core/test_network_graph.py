"""A network taken apart into steps computes what the network computes."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.errors import AdapterError  # noqa: E402 - needs keras
from dafne_federated.core.network_graph import read_graph, run_steps  # noqa: E402

layers = keras.layers


class Halves(layers.Layer):  # type: ignore[misc, name-defined]
    """Gives two tensors, takes a further argument, and is never to be told to train."""

    def call(self, x: object, factor: float = 1.0, training: bool | None = None) -> object:
        assert not training
        return x[..., ::2] * factor, x[..., 1::2]  # type: ignore[index]


def block() -> "keras.Model":
    enter = keras.Input((6,))
    return keras.Model(enter, layers.Add()([layers.Dense(6, activation="tanh")(enter), enter]))


def network() -> "keras.Model":
    inputs = keras.Input((6,))
    nested = block()
    first, second = Halves()(inputs, factor=2.0)
    level = layers.Concatenate()([second, first])
    level = nested(layers.Dropout(0.9)(nested(level)))  # the same network twice
    level = keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.ReLU()])(level)
    level = keras.ops.sin(level) + level * 0.5
    return keras.Model(inputs, layers.Add()([level, inputs]))


def test_all_steps_together_are_the_network() -> None:
    keras.utils.set_random_seed(0)
    whole = network()
    graph = read_graph(whole)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    known = run_steps(graph.steps, {graph.inputs[0]: x})
    np.testing.assert_allclose(known[graph.outputs[0]], whole(x, training=False), rtol=1e-6)
    for number, value in known.items():
        assert tuple(value.shape[1:]) == graph.shapes[number][1:]


def test_every_step_reads_what_was_made_before() -> None:
    graph = read_graph(network())
    made = set(graph.inputs)
    for step in graph.steps:
        assert made.issuperset(step.inputs)
        assert made.isdisjoint(step.outputs)
        made.update(step.outputs)
    assert made.issuperset(graph.outputs)
    assert not any(isinstance(step.layer, keras.Model) for step in graph.steps)


def test_what_varies_is_what_lies_behind_a_trained_layer() -> None:
    inputs = keras.Input((6,))
    before = layers.Dense(6)(inputs)
    middle = layers.Dense(6)
    side = layers.Dense(6)(before)
    after = layers.Add()([layers.ReLU()(middle(before)), side])
    graph = read_graph(keras.Model(inputs, after))
    varying = graph.varying({id(middle)})
    kinds = [type(s.layer).__name__ for s in graph.steps if not varying.isdisjoint(s.outputs)]
    assert kinds == ["Dense", "ReLU", "Add"]
    assert graph.varying(set()) == set()


def test_a_network_that_is_no_graph_of_layers_is_refused() -> None:
    class Own(keras.Model):  # type: ignore[misc, name-defined]
        def call(self, x: object) -> object:
            return x

    with pytest.raises(AdapterError, match="is not a graph of layers, as Dafne's networks are"):
        read_graph(Own())
