"""With pooled counts, cases weigh labels as Dafne weighs them when it prepares all at once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.boundary_weight import weight_map
from dafne_federated.core.class_weights import (
    ClassCounts,
    class_counts,
    pool_counts,
    reweighted,
)
from dafne_federated.core.errors import MessageError, ModelFileError
from dafne_federated.core.slices import PreparedSlices, concatenate

SIZE, CHANNELS = 32, 4


def drawn(seed: int, count: int = 3, most: int = CHANNELS) -> tuple[Any, Any]:
    """Return images and label numbers of slices with squares of labels below ``most``."""
    generator = np.random.default_rng(seed)
    images = generator.normal(100, 10, (count, SIZE, SIZE)).astype(np.float32)
    labels = np.zeros((count, SIZE, SIZE), np.uint8)
    for index in range(count):
        for label in range(1, most):
            row, column = generator.integers(0, 20, 2)
            labels[index, row : row + 3 + 2 * label, column : column + 9] = label
    images[labels > 0] += 50
    return images, labels


def prepared(images: Any, labels: Any) -> PreparedSlices:
    """Prepare slices as one set, with weights written from Dafne's formula."""
    holding = [(labels == c).any(axis=(1, 2)).sum() for c in range(CHANNELS)]
    shares = [(labels == c).sum() / (n * SIZE**2) if n else 0.0 for c, n in enumerate(holding)]
    mean = sum(shares) / CHANNELS
    maps = [
        weight_map(i, s, mean, shares, SIZE, 49, CHANNELS)
        for i, s in zip(images, labels, strict=True)
    ]
    return PreparedSlices(images, labels, np.stack(maps), CHANNELS)


SETS = [drawn(0), drawn(1, 5), drawn(2, 1, most=2)]


def test_pooled_counts_are_those_of_all_slices() -> None:
    parts = [prepared(*one) for one in SETS]
    assert pool_counts([class_counts(part) for part in parts]) == class_counts(concatenate(parts))
    assert sum(class_counts(parts[1]).pixels) == 5 * SIZE**2
    assert class_counts(parts[2]).slices[2:] == (0, 0)


def test_weights_are_those_of_all_slices_prepared_at_once() -> None:
    parts = [prepared(*one) for one in SETS]
    together = prepared(*(np.concatenate(arrays) for arrays in zip(*SETS, strict=True)))
    pooled = pool_counts([class_counts(part) for part in parts])
    found = concatenate([reweighted(part, pooled) for part in parts])
    np.testing.assert_allclose(found.weights, together.weights, rtol=1e-6)
    assert found.weights.dtype == np.float32
    assert np.abs(concatenate(parts).weights - together.weights).max() > 0.1


@pytest.mark.slow
def test_they_are_those_that_dafne_itself_gives_to_all_slices() -> None:
    preprocess = pytest.importorskip("dafne_dl.common.preprocess_train")
    one_hot = np.eye(CHANNELS)

    def by_dafne(images: Any, labels: Any) -> PreparedSlices:
        masks = [one_hot[one].copy() for one in labels]
        arrays = np.asarray(preprocess.input_creation_mem(list(images), masks, 49))
        return PreparedSlices(images, labels, arrays[..., -1].astype(np.float32), CHANNELS)

    parts = [by_dafne(*one) for one in SETS]
    together = by_dafne(*(np.concatenate(arrays) for arrays in zip(*SETS, strict=True)))
    pooled = pool_counts([class_counts(part) for part in parts])
    found = concatenate([reweighted(part, pooled) for part in parts])
    np.testing.assert_allclose(found.weights, together.weights, rtol=1e-6)


def test_own_counts_change_nothing() -> None:
    part = prepared(*SETS[0])
    found = reweighted(part, class_counts(part))
    np.testing.assert_allclose(found.weights, part.weights, rtol=1e-7)


def test_a_label_that_the_pool_does_not_have_keeps_its_own_term() -> None:
    part = prepared(*SETS[0])
    without = prepared(*SETS[2])
    found = reweighted(part, class_counts(without))
    missing = part.labels >= 2
    np.testing.assert_allclose(found.weights[missing], part.weights[missing], rtol=1e-6)
    assert np.isfinite(found.weights).all()


def test_weights_that_are_not_dafnes_are_refused() -> None:
    part = prepared(*SETS[0])
    plain = replace(part, weights=np.ones_like(part.weights))
    with pytest.raises(ModelFileError, match="not those of Dafne's own preparation"):
        reweighted(plain, class_counts(part))


@pytest.mark.parametrize(
    "counts",
    [
        ClassCounts((10, 10), (1, 1)),
        ClassCounts((10, 10, 10, 10), (1, 1, 1)),
        ClassCounts((SIZE**2 + 1, 0, 0, 0), (1, 0, 0, 0)),
    ],
)
def test_counts_that_cannot_be_of_such_slices_are_refused(counts: ClassCounts) -> None:
    with pytest.raises(MessageError, match="the pooled counts are not of 4 channels"):
        reweighted(prepared(*SETS[0]), counts)
