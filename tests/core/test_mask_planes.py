"""Masks are zoomed with SciPy's bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dafne_federated.core import mask_planes

FACTORS = st.floats(0.2, 4.0) | st.sampled_from([1.0, 0.5, 2.0, 250 / 249, 1 / 3])


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    factors=st.tuples(FACTORS, FACTORS),
    dtype=st.sampled_from(
        ["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float64"]
    ),
    seed=st.integers(0, 9),
)
def test_any_mask_at_any_factor_is_zoomed_alike(shape, factors, dtype, seed):
    mask = np.random.default_rng(seed).integers(0, 3, shape).astype(dtype)
    ours = mask_planes.zoom(mask, np.array(factors), order=0)
    theirs = ndimage.zoom(mask, np.array(factors), order=0)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("pixels", [250, 256, 432])
@pytest.mark.parametrize("spacing", [0.42, 0.5, 0.78125, 0.9375, 1.037, 1.25])
def test_the_sizes_and_resolutions_of_clinical_images_are_zoomed_alike(pixels, spacing):
    mask = (np.indices((pixels, pixels)).sum(axis=0) % 7 < 3).astype(np.uint8)
    for resolution in (1.037037, 1.40625, 0.9):
        factor = np.array([spacing, spacing]) / resolution
        expected = ndimage.zoom(mask, factor, order=0)
        assert np.array_equal(mask_planes.zoom(mask, factor, order=0), expected)


def test_images_and_other_orders_go_to_scipy():
    image = np.random.default_rng(0).normal(size=(20, 30))
    assert np.array_equal(mask_planes.zoom(image, [1.2, 0.7]), ndimage.zoom(image, [1.2, 0.7]))
    assert np.array_equal(
        mask_planes.zoom(image, 1.2, order=1, mode="nearest"),
        ndimage.zoom(image, 1.2, order=1, mode="nearest"),
    )
    mask = image > 0
    assert np.array_equal(mask_planes.zoom(mask, 1.5, order=0), ndimage.zoom(mask, 1.5, order=0))
    assert np.array_equal(
        mask_planes.zoom(np.stack([mask, mask]), 2, order=0),
        ndimage.zoom(np.stack([mask, mask]), 2, order=0),
    )
