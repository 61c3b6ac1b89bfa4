"""A proximal term pulls as its gradient says, on every path, and is traced once; moments stay."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.errors import StateError  # noqa: E402 - needs keras
from dafne_federated.core.optimiser_state import AdamState, carried_over  # noqa: E402
from dafne_federated.core.prefix_cache import PrefixCache  # noqa: E402
from dafne_federated.core.proximal import ProximalAdam  # noqa: E402
from dafne_federated.core.suffix_training import SuffixTraining  # noqa: E402
from dafne_federated.core.training import AdapterTraining  # noqa: E402
from tests.core.test_suffix_training import adapted_network, loss, some_slices  # noqa: E402


def test_the_gradient_is_that_of_the_loss_plus_that_of_the_term() -> None:
    generator = np.random.default_rng(0)
    held, now, gradient = generator.normal(size=(3, 4)).astype("f4")
    mu, step, variable = 0.7, 1e-3, keras.Variable(held)
    optimiser = ProximalAdam(mu)
    optimiser.build([variable])
    optimiser.hold([variable])
    variable.assign(now)
    optimiser.apply([keras.ops.convert_to_tensor(gradient)], [variable])

    def term(x: np.ndarray) -> float:
        return mu / 2 * float(np.sum(np.square(x - held, dtype=np.float64)))

    slopes = [(term(now + e) - term(now - e)) / (2 * step) for e in step * np.eye(4)]
    (first,) = (v for v in optimiser.variables if v.name.endswith("momentum"))
    np.testing.assert_allclose(first.numpy(), 0.1 * (gradient + slopes), rtol=1e-4)


def moved(proximal: float, cache: PrefixCache | None = None) -> dict[str, np.ndarray]:
    adapted = adapted_network("decoder")
    start = adapted.read()
    training = SuffixTraining(adapted, loss, proximal=proximal)
    training.run(some_slices(), 8, 2, 0.01, 4, cache=cache)
    return {key: value - start[key] for key, value in adapted.read().items()}


def test_the_stronger_the_term_the_less_a_round_moves() -> None:
    strengths = (0, 0.1, 1, 30)
    sizes = [np.sqrt(sum(np.sum(c**2) for c in moved(mu).values())) for mu in strengths]
    assert all(less < 0.5 * more for more, less in itertools.pairwise(sizes))
    assert sizes[-1] < 0.02 * sizes[0]


def test_the_term_is_the_same_with_features_from_disk(tmp_path: Path) -> None:
    with_cache, without = moved(0.5, PrefixCache(tmp_path, 10)), moved(0.5)
    assert len(list(tmp_path.iterdir())) == 1
    plain = moved(0)
    for key, value in without.items():
        np.testing.assert_allclose(with_cache[key], value, atol=2e-4)
    assert max(np.abs(plain[key] - without[key]).max() for key in plain) > 1e-3


def test_each_round_holds_to_where_it_starts_and_nothing_is_traced_again() -> None:
    traced = []

    def told(truth: Any, output: Any) -> Any:
        traced.append(1)
        return loss(truth, output)

    adapted = adapted_network("all")
    training = AdapterTraining(adapted, told, proximal=100.0)
    training.run(some_slices(), 1, 2, 0.01, 4)
    first, count = adapted.read(), len(traced)
    elsewhere = {key: value + np.float32(0.3) for key, value in first.items()}
    adapted.write(elsewhere)
    training.run(some_slices(), 4, 2, 0.01, 4)
    assert len(traced) == count
    for key, value in adapted.read().items():
        assert np.abs(value - elsewhere[key]).max() < 0.1  # not pulled back by 0.3


@pytest.mark.parametrize("proximal", [0.0, 0.1])
def test_a_kept_optimiser_goes_on_in_the_same_bits_on_whichever_path(
    tmp_path: Path, proximal: float
) -> None:
    """Two runs of one epoch with what Adam knew in between are one run: here by hand."""
    slices, known = some_slices(), []
    for cache in (None, PrefixCache(tmp_path, 10)):
        adapted = adapted_network("decoder")
        training, batches = SuffixTraining(adapted, loss, proximal=proximal).on(slices, cache)
        training.run(batches, 2, 2, 0.01, 4)
        adam = training.adam()
        assert adam.steps == 6
        assert adam.first.keys() == adapted.read().keys() == adam.second.keys()
        assert {key[-1] for key in adam.factors} == {"a", "b"}
        for key, value in adam.factors.items():
            np.testing.assert_array_equal(value, adapted.read()[key])
        known.append(adam)
        training.run(batches, 1, 2, 0.01, 5, adam=carried_over(adam, adapted.read()))
        kept, now = adapted.read(), training.adam()
        assert now.steps == 9
        adapted.write(adapted.read() | adam.factors)
        other, same = SuffixTraining(adapted_network("decoder"), loss, proximal=proximal), {}
        again, batches = other.on(slices, cache)
        again.run(batches, 2, 2, 0.01, 4)
        again.run(batches, 1, 2, 0.01, 5, adam=adam)
        same = other.adapted.read()
        assert all(np.array_equal(same[key], kept[key]) for key in kept)
        again.run(batches, 1, 2, 0.01, 5)
        assert again.adam().steps == 3  # a fresh one, when none is given
    for key, value in known[0].first.items():
        np.testing.assert_allclose(known[1].first[key], value, atol=1e-4)


def test_moments_of_other_arrays_are_refused() -> None:
    training = AdapterTraining(adapted_network("all"), loss)
    adam = training.adam()
    fewer = {key: value for key, value in adam.first.items() if not key.endswith("/a")}
    with pytest.raises(StateError, match="optimiser: expected moments of"):
        training.run(some_slices(), 1, 2, 0.01, 4, adam=AdamState(3, fewer, adam.second, {}))
