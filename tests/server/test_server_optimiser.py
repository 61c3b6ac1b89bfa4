"""A server optimiser steps as a pencil says, leaves alone what it must, and goes on in bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from dafne_federated.core.errors import RunError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import State, state_bytes
from dafne_federated.server.server_optimiser import stepped
from tests.server.conftest import run_with_stops

Make = Callable[..., Any]
OPTIMISERS = ("momentum", "adam")
HEAD = "0006/delta"


@pytest.fixture(autouse=True)
def flower() -> None:
    """Flower makes messages only for a known task."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def steps(
    folder: RunFolder, plan: AdaptationPlan, states: list[State], aggregates: list[State]
) -> None:
    """Fill ``states`` with what the server makes of each aggregate, one round after the other."""
    for number, aggregate in enumerate(aggregates, start=len(states)):
        settings = folder.info().settings
        states.append(stepped(folder, settings, plan, number, states[-1], aggregate))


def frozen(make_state: Make, count: int) -> list[State]:
    """Return states that differ in all but ``a``."""
    held = {key: value for key, value in make_state(99).items() if key.endswith("/a")}
    return [make_state(number) | held for number in range(count)]


def test_momentum_and_adam_are_the_recurrences_of_their_papers(
    new_run: Make, make_state: Make, small_plan: AdaptationPlan
) -> None:
    first, *means = frozen(make_state, 4)
    for optimiser, rate in (("momentum", 0.5), ("adam", 0.03)):
        folder = new_run(strategy="frozen-a", server_optimiser=optimiser, server_rate=rate)
        found = [first]
        steps(folder, small_plan, found, means)
        for key in (HEAD, "0004/b", "0000/b"):
            x, m, v = first[key].astype(np.float64), 0.0, 0.0
            for number, mean in enumerate(means, start=1):
                change = mean[key] - x
                if optimiser == "momentum":
                    m = 0.9 * m + change
                    x = x + rate * m
                else:  # with Flower's bias correction, which counts one round more
                    m, v = 0.9 * m + 0.1 * change, 0.99 * v + 0.01 * change**2
                    size = rate * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
                    x = x + size * m / (np.sqrt(v) + 1e-3)
                np.testing.assert_allclose(found[number][key], x, rtol=1e-4, atol=1e-5)


def test_a_rate_of_one_without_memory_takes_each_aggregate(
    new_run: Make, make_state: Make, small_plan: AdaptationPlan
) -> None:
    states = frozen(make_state, 4)
    folder = new_run(strategy="frozen-a", server_optimiser="momentum", server_momentum=0.0)
    found = states[:1]
    steps(folder, small_plan, found, states[1:])
    for state, aggregate in zip(found, states, strict=True):
        assert all(np.array_equal(state[key], value) for key, value in aggregate.items())


def test_without_memory_each_round_goes_the_same_part_of_its_way(
    new_run: Make, make_state: Make, small_plan: AdaptationPlan
) -> None:
    first, *means = frozen(make_state, 4)
    settings = {"server_optimiser": "momentum", "server_momentum": 0.0, "server_rate": 0.5}
    found = [first]
    steps(new_run(strategy="frozen-a", **settings), small_plan, found, means)
    for before, after, mean in zip(found, found[1:], means, strict=False):
        for key, value in after.items():
            np.testing.assert_allclose(value, (before[key] + mean[key]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_what_stood_still_and_stored_statistics_keep_their_bits(
    new_run: Make, make_statistics_state: Make, statistics_plan: AdaptationPlan, optimiser: str
) -> None:
    kept = make_statistics_state(7)
    kept["0008/delta"][:2] = -0.0, 1e-41
    names = [
        n for n in kept if n.endswith("/a") or n in statistics_plan.state_shapes(trained=False)
    ]
    states = [make_statistics_state(n) | {name: kept[name] for name in names} for n in range(3)]
    found = states[:1]
    folder = new_run(strategy="frozen-a", server_optimiser=optimiser)
    steps(folder, statistics_plan, found, states[1:])
    for name in names:
        assert found[2][name].tobytes() == kept[name].tobytes()
    assert (found[2][HEAD] != states[2][HEAD]).any()


def test_alternating_factors_remember_their_own_rounds(
    new_run: Make, make_state: Make, small_plan: AdaptationPlan
) -> None:
    folder = new_run(strategy="alternating", server_optimiser="momentum")
    found = [make_state(0)]
    for number, moving in ((1, "/b"), (2, "/a"), (3, "/b")):
        new = make_state(number)
        mean = {k: new[k] if k.endswith((moving, "/delta")) else v for k, v in found[-1].items()}
        steps(folder, small_plan, found, [mean])
        if number == 2:
            for key in found[2]:
                same = np.array_equal(found[2][key], found[1][key])
                assert same == key.endswith("/b")
    b = [state["0004/b"].astype(np.float64) for state in found]
    first, second = make_state(1)["0004/b"] - b[0], make_state(3)["0004/b"] - b[2]
    np.testing.assert_allclose(b[3], b[2] + 0.9 * first + second, atol=1e-5)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("strategy", ["frozen-a", "alternating"])
def test_a_run_stopped_anywhere_ends_in_the_same_bits(
    new_run: Make, make_grid: Make, strategy: str, optimiser: str
) -> None:
    def run(stops: tuple[int, ...] = (), **settings: Any) -> bytes:
        folder = new_run(strategy=strategy, **settings)
        run_with_stops(make_grid, folder, stops)
        return state_bytes(folder.plan(), folder.state_after(3))

    whole = run(server_optimiser=optimiser)
    assert run((1, 2, 3, 4), server_optimiser=optimiser) == whole
    assert run() != whole


def test_a_round_that_was_not_finished_is_stepped_again_from_the_one_before(
    new_run: Make, make_state: Make, small_plan: AdaptationPlan
) -> None:
    folder = new_run(strategy="frozen-a", server_optimiser="adam")
    first, second, third = frozen(make_state, 3)
    found = [first]
    steps(folder, small_plan, found, [second, third])
    settings = folder.info().settings
    again = stepped(folder, settings, small_plan, 2, found[1], third)
    assert all(np.array_equal(again[key], found[2][key]) for key in again)
    path = folder.path / "checkpoints" / "server-optimiser-0001.npz"
    whole = path.read_bytes()
    for damaged in (whole[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="what the server optimiser knew cannot be read"):
            stepped(folder, settings, small_plan, 2, found[1], third)
