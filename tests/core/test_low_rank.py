"""Arithmetic on pairs agrees with dense arithmetic on what they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafne_federated.core.low_rank import (
    dense_product,
    directions,
    distance_to_sum,
    inner_product,
    mean_of_products,
    product_gram,
    product_norm,
    widen,
)

Pair = tuple[np.ndarray, np.ndarray]


def pair(seed: int, m: int, r: int, n: int) -> Pair:
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=(m, r)).astype("float32"),
        generator.normal(size=(r, n)).astype("float32"),
    )


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 12))


@given(SHAPES, st.integers(0, 999))
def test_norm_is_that_of_the_dense_product(shape: tuple[int, int, int], seed: int) -> None:
    p = pair(seed, *shape)
    assert product_norm(p) == pytest.approx(np.linalg.norm(dense_product(p)), rel=1e-6, abs=1e-6)


@given(SHAPES, st.integers(1, 5), st.integers(0, 999))
def test_inner_product_is_that_of_the_dense_products(
    shape: tuple[int, int, int], rank: int, seed: int
) -> None:
    p, q = pair(seed, *shape), pair(seed + 1, shape[0], rank, shape[2])
    want = np.sum(dense_product(p) * dense_product(q))
    assert inner_product(p, q) == pytest.approx(want, rel=1e-6, abs=1e-5)


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4),
       st.integers(1, 6), st.integers(0, 99))  # fmt: skip
def test_mean_is_the_best_of_its_rank(
    m: int, n: int, ranks: list[int], rank: int, seed: int
) -> None:
    pairs = [pair(seed + i, m, r, n) for i, r in enumerate(ranks)]
    weights = [float(w) for w in np.random.default_rng(seed).dirichlet(np.ones(len(ranks)))]
    want = sum(w * dense_product(p) for w, p in zip(weights, pairs, strict=True))
    got = mean_of_products(pairs, weights, rank)
    assert (got[0].shape, got[1].shape) == ((m, rank), (rank, n))
    left_out = np.linalg.norm(np.linalg.svd(want, compute_uv=False)[rank:])
    size = np.linalg.norm(want) + 1
    assert np.linalg.norm(want - dense_product(got)) == pytest.approx(left_out, abs=1e-5 * size)
    assert distance_to_sum(got, pairs, weights) == pytest.approx(left_out, abs=1e-5 * size)


def test_convolution_shapes_are_kept() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(3, 3, 5, 2)).astype("float32")
    b = generator.normal(size=(2, 7)).astype("float32")
    got_a, got_b = mean_of_products([(a, b), (a, b)], [0.5, 0.5], 3)
    assert (got_a.shape, got_b.shape) == ((3, 3, 5, 3), (3, 7))


def test_signs_are_fixed() -> None:
    p = pair(0, 6, 3, 4)
    turned = (-p[0], -p[1])  # the same product
    for got, want in zip(
        mean_of_products([p], [1.0], 3), mean_of_products([turned], [1.0], 3), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_distance_near_zero_keeps_its_digits() -> None:
    p = pair(0, 50, 4, 60)
    assert distance_to_sum(p, [p], [1.0]) <= 1e-12 * product_norm(p)


def test_gram_holds_the_inner_products_of_pairs_of_any_ranks() -> None:
    pairs = [pair(rank, 7, rank, 5) for rank in (1, 3, 2)]
    want = [[inner_product(p, q) for q in pairs] for p in pairs]
    np.testing.assert_allclose(product_gram(pairs), want, rtol=1e-12)


def test_directions_are_as_many_as_there_really_are() -> None:
    p, q = pair(0, 9, 2, 8), pair(1, 9, 3, 8)
    assert directions([p, p, p], [0.2, 0.3, 0.5]).values.size == 2
    assert directions([p, q], [0.5, 0.5]).values.size == 5
    assert directions([p, p], [0.5, -0.5]).values.size == 0


def test_the_rest_of_a_cut_is_what_is_missing() -> None:
    p = pair(0, 9, 5, 8)
    found = directions([p], [1.0])
    kept, rest = found.pair(0, 2), found.pair(2, 7)
    assert rest[0].shape == (9, 5)
    np.testing.assert_allclose(
        dense_product(kept) + dense_product(rest), dense_product(p), atol=1e-5
    )
    assert found.norm(2) == pytest.approx(product_norm(rest), rel=1e-6)


def test_widening_changes_no_product() -> None:
    p = pair(0, 4, 2, 3)
    wide = widen(p, 5)
    assert (wide[0].shape, wide[1].shape) == ((4, 5), (5, 3))
    np.testing.assert_array_equal(dense_product(wide), dense_product(p))
