"""The weight map has Dafne's bits: distances along axis rays, third labels, dark pixels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafne_federated.core.boundary_weight import weight_map
from dafne_federated.core.errors import DataError

BAND = 49


def weigh(function, image, labels, count, band=BAND):
    frequencies = [0.01 + 0.5 / (label + 1) for label in range(count)]
    mean = sum(frequencies) / count
    return function(image, labels, mean, frequencies, labels.shape[0], band, count)


@pytest.fixture(scope="module")
def dafne():
    pytest.importorskip("SimpleITK")
    from dafne_dl.common import preprocess_train

    return preprocess_train


def assert_like_dafne(dafne, image, labels, count, band=BAND):
    with np.errstate(all="ignore"):
        ours = weigh(weight_map, image, labels, count, band)
        theirs = weigh(dafne.calc_weight, image, labels, count, band)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


def half_bright(side):
    image = np.zeros((side, side), np.float32)
    image[:, side // 4 :] = 600
    return image


def torture_cases():
    rng = np.random.default_rng(5)
    side = 44
    rows, columns = np.indices((side, side))
    stripes = (columns // 5) % 4
    touching = np.zeros((side, side))
    touching[0, :] = 1
    touching[:, 0] = 2
    touching[-1, :] = 3
    touching[:, -1] = 4
    islands = np.where(rng.random((side, side)) < 0.02, rng.integers(1, 7, (side, side)), 0)
    far = np.zeros((side, side))
    far[20, 20], far[20, 41], far[20, 0], far[41, 20] = 1, 2, 3, 4
    return {
        "no label": np.zeros((side, side)),
        "one label everywhere": np.ones((side, side)),
        "one label": (rows > 20) * 1.0,
        "stripes": stripes * 1.0,
        "checks": ((rows + columns) % 3) * 1.0,
        "labels on the border": touching,
        "islands of one pixel": islands * 1.0,
        "labels at the very end of the reach": far,
        "noise": rng.integers(0, 13, (side, side)) * 1.0,
        "many labels": rng.integers(0, 300, (side, side)) * 1.0,
        "whole numbers": stripes.astype(np.int64),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", torture_cases())
def test_torture_cases_have_dafnes_bits(dafne, name):
    labels = torture_cases()[name]
    count = int(labels.max()) + 2
    assert_like_dafne(dafne, half_bright(len(labels)), labels, count)
    assert_like_dafne(dafne, half_bright(len(labels))[::-1, ::-1], labels.T, count, band=20)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    side=st.integers(1, 40),
    labels=st.integers(1, 14),
    density=st.floats(0.0, 1.0),
    block=st.integers(1, 12),
    band=st.sampled_from([1, 20, 49, 64]),
    seed=st.integers(0, 2**16),
)
def test_random_label_maps_have_dafnes_bits(dafne, side, labels, density, block, band, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, labels + 1, (side, side)) * (rng.random((side, side)) < density)
    drawn = np.kron(coarse, np.ones((block, block)))[:side, :side]
    image = rng.normal(300, 100, (side, side)).astype(np.float32)
    assert_like_dafne(dafne, image, drawn, labels + 1, band)


@pytest.mark.slow
def test_a_constant_image_weighs_by_frequency_alone_as_in_dafne(dafne):
    labels = torture_cases()["stripes"]
    assert_like_dafne(dafne, np.full(labels.shape, 5.0), labels, 4)


def test_hand_worked_distances_give_the_published_weight():
    labels = np.zeros((60, 60))
    labels[30, 27], labels[30, 36] = 1, 2
    image = np.zeros((60, 60))
    image[30, 30] = 100
    weights = weight_map(image, labels, 0.5, [0.25, 1.0, 1.0], 60, BAND, 3)
    assert weights[0, 0] == 2.0
    assert weights[30, 27] == 0.5
    assert weights[30, 30] == np.float32(10 * math.exp(-(9**2) / 98) + 2.0)


def test_an_image_without_a_finite_range_is_refused_in_words():
    labels = np.zeros((8, 8))
    with pytest.raises(DataError, match="grey values that are not finite"):
        weigh(weight_map, np.full((8, 8), np.nan), labels, 2)


def test_labels_that_do_not_fit_are_refused_in_words():
    image = half_bright(8)
    with pytest.raises(DataError, match=r"one square shape, got \(8, 8\) and \(8, 6\)"):
        weigh(weight_map, image, np.zeros((8, 6)), 2)
    with pytest.raises(DataError, match="whole numbers below 2, got up to"):
        weigh(weight_map, image, np.full((8, 8), 2.0), 2)
    with pytest.raises(DataError, match="whole numbers"):
        weigh(weight_map, image, np.full((8, 8), 0.5), 2)
