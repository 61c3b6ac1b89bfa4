"""Pooled moments are those of all values at once, and folding brings a base to them."""

import numpy as np
import pytest

from dafne_federated.core.moments import Moments, moments, pool_moments, statistics_change
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import fold

MEAN = Target(key="0002", layer="n", kind="mean", shape=(3,))
VARIANCE = Target(key="0003", layer="n", kind="variance", shape=(3,))
HEAD = Target(key="0009", layer="h", kind="delta", shape=(1,))
PLAN = AdaptationPlan(
    base_digest="b" * 64,
    method="head",
    rank=1,
    max_rank=1,
    scale=1.0,
    labels=("bright",),
    targets=(MEAN, VARIANCE, HEAD),
)


def folded(mean: np.ndarray, variance: np.ndarray, pooled: Moments) -> tuple[np.ndarray, ...]:
    weights = {"0002": mean, "0003": variance, "0009": np.ones(1, np.float32)}
    state = statistics_change(MEAN, VARIANCE, (mean, variance), pooled)
    after = fold(weights, PLAN, state | {"0009/delta": np.zeros(1, np.float32)})
    return after["0002"], after["0003"]


@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1), (40, 3, 500), (2, 1000)])
def test_pooled_parts_are_all_values_at_once(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    offsets = generator.normal(scale=50, size=(len(sizes), 3))
    parts = [o + generator.normal(size=(n, 3)) for n, o in zip(sizes, offsets, strict=True)]
    together = np.concatenate(parts)
    pooled = pool_moments([moments(part) for part in parts])
    assert pooled.count == len(together)
    np.testing.assert_allclose(pooled.mean, together.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(pooled.variance, together.var(axis=0), rtol=1e-12)


def test_a_small_spread_far_from_zero_is_not_lost() -> None:
    # mean(x^2) - mean(x)^2 would lose all sixteen digits of it here
    parts = [Moments(1, np.full(3, 1e9 + d), np.zeros(3)) for d in (-1.0, 0.0, 1.0)]
    np.testing.assert_allclose(pool_moments(parts).variance, 2 / 3, rtol=1e-6)


def test_pools_of_pools_and_counts_in_proportion_are_the_same() -> None:
    generator = np.random.default_rng(1)
    parts = [moments(generator.normal(size=(n, 3))) for n in (4, 8, 12)]
    pooled = pool_moments(parts)
    again = pool_moments([pool_moments(parts[:2]), parts[2]])
    fewer = pool_moments([Moments(p.count // 4, p.mean, p.variance) for p in parts])
    for other in (again, fewer):
        np.testing.assert_allclose(other.mean, pooled.mean, rtol=1e-12)
        np.testing.assert_allclose(other.variance, pooled.variance, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_folding_gives_the_pooled_statistics(size: float) -> None:
    generator = np.random.default_rng(2)
    mean, variance = generator.normal(size=(2, 3)).astype(np.float32)
    pooled = Moments(7, size * generator.normal(size=3), size * generator.uniform(0.1, 1, 3))
    found = folded(mean, np.abs(variance), pooled)
    largest = max(size, 1.0)
    np.testing.assert_allclose(found[0], pooled.mean, atol=1e-6 * largest)
    np.testing.assert_allclose(found[1], pooled.variance, atol=1e-6 * largest)


def test_no_variance_falls_below_zero() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        variance = (10.0 ** generator.uniform(-6, 6, 3)).astype(np.float32)
        pooled = Moments(1, np.zeros(3), variance * 10.0 ** generator.uniform(-12, -6, 3))
        pooled.variance[0] = 0.0
        assert (folded(np.zeros(3, np.float32), variance, pooled)[1] >= 0).all()
