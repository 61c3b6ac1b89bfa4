"""No person moves a step by more than the clip, and the noise is what it is said to be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

keras = pytest.importorskip("keras")

from dafne_federated.core.prefix_cache import PrefixCache  # noqa: E402 - needs keras
from dafne_federated.core.privacy_accountant import Mechanism  # noqa: E402
from dafne_federated.core.private_training import (  # noqa: E402
    PersonSteps,
    PrivateTraining,
    clipped,
    draw,
    generators,
    slices_by_person,
)
from dafne_federated.core.suffix_training import SuffixTraining  # noqa: E402
from dafne_federated.core.training import AdapterTraining  # noqa: E402
from tests.core.test_suffix_training import adapted_network, loss, some_slices  # noqa: E402

PERSONS = ["anna", "ben", "anna", "carl", "ben", "anna", "dora"]  # of the seven slices
SEED = bytes(range(32))


def started(where: str = "decoder", method: str = "lora") -> Any:
    """Return a network in which both factors have a gradient."""
    adapted = adapted_network(where, method=method)
    generator = np.random.default_rng(0)
    adapted.write(
        {k: v + generator.normal(0, 0.05, v.shape).astype("f4") for k, v in adapted.read().items()}
    )
    return adapted


def steps_on(adapted: Any) -> PersonSteps:
    return PersonSteps(SuffixTraining(adapted, loss).network(some_slices())[0], loss)


def trained(seed: bytes, cache: PrefixCache | None = None, **changes: Any) -> dict[str, Any]:
    adapted = started()
    mechanism = Mechanism(**({"noise": 1.0, "clip": 0.5, "rate": 0.5} | changes))
    training = PrivateTraining(SuffixTraining(adapted, loss))
    result = training.run(some_slices(), PERSONS, mechanism, 2, 2, 0.01, seed, cache)
    assert (result.steps, result.loss) == (mechanism.steps(2), None)
    return dict(adapted.read())


@pytest.mark.parametrize("clip", [1e-3, 0.05])
def test_one_person_changes_the_sum_by_at_most_the_clip(clip: float) -> None:
    steps, slices = steps_on(started()), some_slices()
    owned = slices_by_person(PERSONS)
    everybody = steps.clipped_sum(slices, owned, clip)
    longest = 0.0
    for left_out in range(len(owned)):
        others = [own for number, own in enumerate(owned) if number != left_out]
        change = np.linalg.norm(everybody - steps.clipped_sum(slices, others, clip))
        longest = max(longest, float(change))
        assert change <= clip * (1 + 1e-9)
    assert longest > 0.99 * clip  # the bound is reached, so it is tested


def test_the_clip_is_of_all_variables_together_and_keeps_the_direction() -> None:
    vector = np.array([3.0, 4.0, 12.0])
    np.testing.assert_allclose(clipped(vector, 6.5), vector / 2, rtol=1e-15)
    np.testing.assert_array_equal(clipped(vector, 13.0), vector)
    np.testing.assert_array_equal(clipped(np.zeros(3), 1.0), np.zeros(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_does_not_pass(bad: float) -> None:
    np.testing.assert_array_equal(clipped(np.array([1.0, bad]), 1.0), np.zeros(2))


def test_without_noise_and_clip_it_is_the_mean_gradient_over_persons() -> None:
    """One step of Adam along the mean of each person's gradient, from TensorFlow's own tape."""
    import tensorflow as tf

    plain, slices = started(), some_slices()
    variables = plain.trained.trainable_variables
    gradients = []
    for person in sorted(set(PERSONS)):
        inputs, truth = slices.batch(np.flatnonzero(np.array(PERSONS) == person))
        with tf.GradientTape() as tape:
            value = loss(truth, plain.trained(inputs))
        gradients.append([g.numpy() for g in tape.gradient(value, [v.value for v in variables])])
    keras.optimizers.Adam(0.01).apply(
        [np.mean(parts, axis=0) for parts in zip(*gradients, strict=True)], variables
    )
    private = started()
    PrivateTraining(SuffixTraining(private, loss)).run(
        slices, PERSONS, Mechanism(0.0, 1e9, 1.0), 1, 7, 0.01, SEED
    )
    before = started().read()
    for key, array in plain.read().items():
        assert np.abs(array - before[key]).max() > 1e-4
        np.testing.assert_allclose(private.read()[key], array, atol=2e-5)


def test_the_noise_has_its_standard_deviation_and_an_empty_draw_makes_a_step_of_it() -> None:
    """Nobody is drawn at this rate, so what reaches Adam is noise / (rate * persons)."""
    adapted, told = started(), []
    training = PrivateTraining(SuffixTraining(adapted, loss))
    network, slices = training.training.network(some_slices())[0], some_slices()
    steps = PersonSteps(network, loss)
    steps.apply = told.append  # type: ignore[method-assign]
    training._steps = steps
    rate = 1e-9
    mechanism = Mechanism(noise=3.0, clip=0.5, rate=rate)
    for number in range(20):
        seed = bytes([number]) * 32
        made = training.run(slices, PERSONS, Mechanism(3.0, 0.5, rate), 0, 2, 0.01, seed)
        assert made.steps == mechanism.steps(0) == 1
    values = np.concatenate(told) * rate * 4
    assert len(told) == 20
    assert values.std() == pytest.approx(1.5, rel=5 / np.sqrt(2 * values.size))
    assert abs(values.mean()) < 5 * 1.5 / np.sqrt(values.size)


def test_persons_are_drawn_by_themselves_and_their_slices_within_the_bound() -> None:
    owned = slices_by_person(PERSONS)
    assert [own.tolist() for own in owned] == [[0, 2, 5], [1, 4], [3], [6]]
    generator = np.random.default_rng(0)
    draws = [draw(owned, 0.3, 2, generator) for _ in range(2000)]
    for drawn in draws:
        for chosen in drawn:
            assert len(set(chosen.tolist())) == len(chosen) <= 2
            assert any(set(chosen.tolist()) <= set(own.tolist()) for own in owned)
    sizes = np.array([len(drawn) for drawn in draws])
    assert sizes.mean() == pytest.approx(1.2, abs=0.1)
    assert sizes.var() == pytest.approx(4 * 0.3 * 0.7, abs=0.15)  # binomial: they are independent
    assert {0, 4} <= set(sizes.tolist())


def test_the_same_seed_gives_the_same_bits_and_another_gives_others(tmp_path: Path) -> None:
    one, again, other = trained(SEED), trained(SEED), trained(SEED[::-1])
    for key, array in one.items():
        np.testing.assert_array_equal(again[key], array)
        assert not np.array_equal(other[key], array)


def test_features_from_disk_give_the_same_training(tmp_path: Path) -> None:
    plain, cached = trained(SEED), trained(SEED, PrefixCache(tmp_path, 10))
    assert list(tmp_path.iterdir())
    for key, array in plain.items():
        np.testing.assert_allclose(cached[key], array, atol=1e-4)


def test_plain_training_beside_it_is_undisturbed() -> None:
    expected = started()
    AdapterTraining(expected, loss).run(some_slices(), 2, 2, 0.01, 4)
    adapted = started()
    start = adapted.read()
    training = SuffixTraining(adapted, loss)
    training.run(some_slices(), 1, 2, 0.01, 4)
    PrivateTraining(training).run(
        some_slices(), PERSONS, Mechanism(1.0, 0.5, 0.5), 1, 2, 0.01, SEED
    )
    adapted.write(start)
    training.run(some_slices(), 2, 2, 0.01, 4)
    for key, array in expected.read().items():
        np.testing.assert_allclose(adapted.read()[key], array, atol=1e-4)


def test_draws_do_not_follow_from_the_noise() -> None:
    first, second = generators(SEED)
    assert not np.array_equal(first.random(8), second.random(8))
