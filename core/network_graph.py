"""The graph of a Keras functional network: which layer reads which tensors, in order."""

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras

from dafne_federated.core.errors import AdapterError
from dafne_federated.core.network_layers import Tensor


@dataclass(frozen=True)
class Step:
    """One use of a layer.

    Attributes:
        layer: The layer, or another operation of Keras.
        inputs: Numbers of the tensors that it reads.
        outputs: Numbers of the tensors that it makes.
        compute: Gives the outputs for the values of the inputs, always in inference mode.
    """

    layer: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    compute: Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Graph:
    """A network as steps in an order in which they can be computed; tensors have numbers.

    Attributes:
        inputs: Tensors that the network is given.
        outputs: Tensors that it returns.
        steps: What happens in between; nested networks are taken apart.
        shapes: Shape of each tensor, the batch first, as None.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: tuple[Step, ...]
    shapes: tuple[tuple[int | None, ...], ...]

    def varying(self, trained: Container[int]) -> set[int]:
        """Return the tensors that change when layers are trained, given by their ``id``."""
        found: set[int] = set()
        for step in self.steps:
            if id(step.layer) in trained or not found.isdisjoint(step.inputs):
                found.update(step.outputs)
        return found


def read_graph(network: keras.Model) -> Graph:
    """Return the graph of ``network``.

    Raises:
        AdapterError: It was not built from layers alone, so it has no graph.
    """
    if not _has_graph(network):
        msg = f"network {network.name!r} is not a graph of layers, as Dafne's networks are"
        raise AdapterError(msg)
    reader = _Reader()
    inputs = [reader.new(tensor) for tensor in network.inputs]
    outputs = reader.read(network, inputs)
    return Graph(tuple(inputs), tuple(outputs), tuple(reader.steps), tuple(reader.shapes))


def run_steps(steps: Iterable[Step], values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the values of all tensors after ``steps``, those given included."""
    known = dict(values)
    for step in steps:
        made = step.compute([known[number] for number in step.inputs])
        known.update(zip(step.outputs, made, strict=True))
    return known


def needed(steps: Sequence[Step], wanted: Iterable[int]) -> tuple[list[Step], tuple[int, ...]]:
    """Return the steps that lead to the wanted tensors, and the tensors given to them."""
    missing, kept = set(wanted), []
    for step in reversed(steps):
        if not missing.isdisjoint(step.outputs):
            kept.append(step)
            missing.difference_update(step.outputs)
            missing.update(step.inputs)
    return kept[::-1], tuple(sorted(missing))


class _Reader:
    """Numbers tensors and collects steps, network within network."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.shapes: list[tuple[int | None, ...]] = []

    def new(self, tensor: keras.KerasTensor) -> int:
        self.shapes.append(tuple(tensor.shape))
        return len(self.shapes) - 1

    def read(self, network: keras.Model, given: Sequence[int]) -> list[int]:
        """Add the steps of one use of ``network`` and return the numbers of its outputs."""
        numbers = {id(own): number for own, number in zip(network.inputs, given, strict=True)}
        for node in _nodes(network):
            inputs = [numbers[id(tensor)] for tensor in node.input_tensors]
            if _has_graph(node.operation):
                outputs = self.read(node.operation, inputs)
            else:
                outputs = [self.new(tensor) for tensor in node.outputs]
                call = partial(_call, node.operation, node.arguments.args, node.arguments.kwargs)
                self.steps.append(Step(node.operation, tuple(inputs), tuple(outputs), call))
            numbers |= {id(t): n for t, n in zip(node.outputs, outputs, strict=True)}
        return [numbers[id(tensor)] for tensor in network.outputs]


def _call(layer: Any, positional: Any, named: Any, values: Sequence[Tensor]) -> list[Tensor]:
    """Call ``layer`` as it was called when the network was built, with other tensors."""
    rest = iter(values)

    def fill(argument: Any) -> Any:
        return next(rest) if isinstance(argument, keras.KerasTensor) else argument

    positional, named = keras.tree.map_structure(fill, (positional, named))
    if "training" in inspect.signature(type(layer).call).parameters:
        named = {**named, "training": False}
    return list(keras.tree.flatten(layer(*positional, **named)))


def _has_graph(operation: Any) -> bool:
    return isinstance(operation, keras.Model) and bool(getattr(operation, "inputs", None))


def _nodes(network: keras.Model) -> list[Any]:
    """Return the uses of layers between inputs and outputs, each after those it reads from."""
    done = {id(tensor) for tensor in network.inputs}
    found: dict[int, Any] = {}
    waiting = list(network.outputs)[::-1]
    while waiting:
        tensor = waiting[-1]
        if id(tensor) in done:
            waiting.pop()
            continue
        history = tensor._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        missing = [t for t in node.input_tensors if id(t) not in done]
        if missing:
            waiting += missing[::-1]
            continue
        waiting.pop()
        done.update(id(made) for made in node.outputs)
        found[id(node)] = node
    return list(found.values())
