"""Area opening and closing give scikit-image's bits, whatever the image."""

import numpy as np
import pytest
import skimage.morphology
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dafne_federated.core import area_filter

PAIRS = [
    pytest.param(area_filter.area_opening, skimage.morphology.area_opening, id="opening"),
    pytest.param(area_filter.area_closing, skimage.morphology.area_closing, id="closing"),
]
WHOLE = ["bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"]


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()


@st.composite
def images(draw, dtypes=(*WHOLE, "float32", "float64")):
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=14))
    if dtype.kind == "f":
        elements = st.floats(-4, 4, width=8 * dtype.itemsize) | st.sampled_from([0.0, 1.0, np.inf])
    elif dtype.kind == "b":
        elements = st.booleans()
    else:
        limits = np.iinfo(dtype)
        elements = st.integers(0, 3) | st.sampled_from([int(limits.min), int(limits.max)])
    return draw(hnp.arrays(dtype, shape, elements=elements, fill=elements))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=100, deadline=None)
@given(image=images())
def test_small_images_of_every_dtype_are_filtered_alike(ours, theirs, image):
    assert_same_bits(ours(image, area_threshold=4), theirs(image, area_threshold=4))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", [*WHOLE, "float32", "float64"])
def test_noisy_images_are_filtered_alike(ours, theirs, dtype):
    rng = np.random.default_rng(7)
    for levels in (2, 5, 200):
        image = rng.integers(0, levels, (61, 47)).astype(dtype)
        assert_same_bits(ours(image, area_threshold=4), theirs(image, area_threshold=4))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_fractional_grey_values_keep_the_rounding_of_the_inversion(ours, theirs):
    image = np.random.default_rng(3).normal(500, 200, (60, 80))
    for dtype in ("float32", "float64"):
        assert_same_bits(
            ours(image.astype(dtype), area_threshold=4),
            theirs(image.astype(dtype), area_threshold=4),
        )


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_masks_with_specks_holes_and_touching_borders_are_filtered_alike(ours, theirs):
    mask = np.zeros((20, 20), np.uint8)
    mask[0, 0] = mask[0, 10:13] = mask[-1, -4:] = mask[5:8, 0] = 1
    mask[8:16, 8:16] = 1
    mask[10, 10] = mask[12, 12:14] = mask[13, 9:12] = mask[14, 9] = 0
    mask[3:5, 3:5] = mask[3, 17] = mask[4, 18] = 1
    for turned in (mask, mask.T, mask[::-1], 1 - mask, np.asfortranarray(mask), mask[::2, 1:]):
        assert_same_bits(ours(turned, area_threshold=4), theirs(turned, area_threshold=4))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (2, 9), (9, 2), (3, 3), (1, 12)])
def test_images_of_few_pixels_are_filtered_alike(ours, theirs, shape):
    image = np.random.default_rng(1).integers(0, 3, shape)
    try:
        expected = theirs(image, area_threshold=4)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            ours(image, area_threshold=4)
    else:
        assert_same_bits(ours(image, area_threshold=4), expected)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_whatever_the_fast_form_does_not_cover_goes_to_scikit_image(ours, theirs):
    rng = np.random.default_rng(2)
    image = rng.integers(0, 3, (15, 15)).astype(np.float64)
    assert_same_bits(ours(image), theirs(image))
    assert_same_bits(ours(image, 9), theirs(image, 9))
    assert_same_bits(ours(image, 4, 2), theirs(image, 4, 2))
    assert_same_bits(ours(image - 1.0, 4), theirs(image - 1.0, 4))
    assert_same_bits(ours(-image, 4), theirs(-image, 4))  # negative zeros
    volume = rng.integers(0, 2, (5, 6, 7)).astype(np.uint8)
    assert_same_bits(ours(volume, 4), theirs(volume, 4))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_image_given_stays_as_it_was(ours, theirs):
    image = np.random.default_rng(2).integers(0, 2, (15, 15)).astype(np.uint8)
    before = image.copy()
    image.setflags(write=False)
    result = ours(image, 4)
    assert np.array_equal(image, before)
    assert result.flags.writeable
    assert result.flags.c_contiguous
