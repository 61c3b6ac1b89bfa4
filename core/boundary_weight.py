"""Dafne's weight map of a training slice, from whole-array steps instead of loops.

Bright pixels close to the borders of two other labels weigh more in Dafne's loss:
``10 * exp(-(d1 + d2)^2 / (2 * band))``, where d1 and d2 are the distances in pixels, along
the four axis rays, to the nearest label that is foreign and to the nearest one that is
foreign to both. Every pixel adds ``mean frequency / frequency of its label``.

Source: `calc_weight` in `dafne_dl/common/preprocess_train.py` (2.0.2b2), whose numbers this
file gives bit for bit; the idea is that of the U-Net (Ronneberger et al. 2015, equation 2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.filters import threshold_otsu

from dafne_federated.core.errors import DataError

Array = npt.NDArray[Any]

_DARK = 0  # row of the table of boundary weights for pixels below the threshold


def weight_map(
    image: Array,
    labels: Array,
    mean_frequency: float,
    frequencies: Sequence[float],
    _dim: int,
    band: float,
    _ch: int,
) -> npt.NDArray[np.float32]:
    """Return the weight of each pixel in the loss, shape of ``labels``, float32.

    Takes the place of Dafne's `calc_weight`; arguments in its order, and the two that it
    does not read are not read here.

    Args:
        image: (rows, columns) grey values; pixels above Otsu's threshold count as bright.
        labels: (rows, columns) whole numbers from 0, the background, to ``len(frequencies)``.
        mean_frequency: mean of ``frequencies``.
        frequencies: share of pixels of each label in the training set.
        band: width of the border region, in squared pixels.

    Raises:
        DataError: the slice is not square, its grey values have no finite range, or a
            label has no frequency. Dafne stops in these cases, too, in other words.
    """
    numbers = _checked_labels(image, labels, len(frequencies))
    bright = image > threshold_otsu(image)
    reach = _reach(band, labels.shape[0])
    rays = _distances(numbers, reach)
    case = np.where(bright.ravel(), rays.case(), _DARK)
    boundary = _boundary_weights(reach, labels.shape[0], band)
    table = np.zeros((len(frequencies), len(boundary)), dtype=np.float32)
    for label in np.flatnonzero(np.bincount(numbers.ravel())).tolist():
        share = mean_frequency / frequencies[label]
        for row, weight in enumerate(boundary):
            # one scalar sum, as in Dafne: it is rounded to float32 once, at the end
            table[label, row] = weight + share
    index = numbers.ravel().astype(np.intp) * len(boundary) + case
    return table.ravel().take(index).reshape(labels.shape)


@dataclass(frozen=True)
class _Rays:
    """Steps to the first and to the second foreign label; ``reach + 1`` where there is none."""

    first: Array
    second: Array
    reach: int

    def case(self) -> Array:
        """Return the row of the table of boundary weights for each pixel.

        Rows 2 to ``2 * reach - 2`` are the sum of both distances. In the last step Dafne
        gives up and sets the first distance to the width of the image, whether or not the
        second label is met in this very step: the two rows behind them.
        """
        total = self.first + self.second
        total[self.second == self.reach] = 2 * self.reach - 1
        total[self.second > self.reach] = 2 * self.reach
        return total


def _checked_labels(image: Array, labels: Array, count: int) -> Array:
    """Return ``labels`` as small unsigned integers after checking both arrays.

    Raises:
        DataError: see `weight_map`.
    """
    if labels.ndim != 2 or labels.shape[0] != labels.shape[1] or image.shape != labels.shape:
        msg = (
            "the weight map needs image and labels of one square shape, "
            f"got {image.shape} and {labels.shape}"
        )
        raise DataError(msg)
    if not np.isfinite(image).all():
        msg = (
            "a slice holds grey values that are not finite; an empty slice becomes one when "
            "it is scaled by its maximum: leave slices without signal out of the training set"
        )
        raise DataError(msg)
    numbers = labels.astype(np.uint8 if count <= np.iinfo(np.uint8).max else np.uint32)
    if not np.array_equal(numbers, labels) or int(numbers.max()) >= count:
        msg = f"labels must be whole numbers below {count}, got up to {labels.max()!r}"
        raise DataError(msg)
    return numbers


def _reach(band: float, side: int) -> int:
    """Return the step in which the search along the rays ends, in pixels."""
    return max(1, math.ceil(min(3 * math.sqrt(band), side - 1)))


def _distances(labels: Array, reach: int) -> _Rays:
    """Walk along the four axis rays of all pixels at once.

    The labels are laid out in one dimension with ``reach`` background cells behind each
    row and as many rows at both ends, so that a step is a fixed offset. Beyond the edge
    Dafne looks at the edge pixel again, which can neither be the first foreign label there
    (it was met when the ray reached it) nor, once one is known, a new second one.
    """
    side = labels.shape[0]
    stride = side + reach
    margin, size = reach * stride + reach, side * stride
    cells = np.zeros(size + 2 * margin, dtype=labels.dtype)
    own = cells[margin : margin + size]
    own.reshape(side, stride)[:, :side] = labels
    counter = np.uint8 if reach < np.iinfo(np.uint8).max // 2 else np.uint32
    first, second = np.ones(size, dtype=counter), np.ones(size, dtype=counter)
    neighbour = np.zeros_like(own)  # the first foreign label, 0 while there is none
    alone = np.ones(size, dtype=np.bool_)
    met = np.zeros(size, dtype=np.bool_)
    mask = np.empty(size, dtype=np.bool_)
    foreign = [np.empty_like(own) for _ in range(4)]
    for step in range(1, reach + 1):
        # right, left, below, above: of several first neighbours Dafne keeps the last in
        # the opposite order
        for label, offset in zip(
            foreign, (step, -step, step * stride, -step * stride), strict=True
        ):
            seen = cells[margin + offset : margin + offset + size]
            np.multiply(seen, np.not_equal(seen, own, out=mask), out=label)
            neighbour |= label * alone
            np.equal(neighbour, 0, out=alone)
        first += alone
        for label in foreign:
            np.not_equal(label, neighbour, out=mask)
            mask &= label != 0
            met |= mask
        second += ~met
    inside = [d.reshape(side, stride)[:, :side].ravel() for d in (first, second)]
    return _Rays(first=inside[0], second=inside[1], reach=reach)


def _boundary_weights(reach: int, side: int, band: float) -> npt.NDArray[np.float32]:
    """Return the boundary weight for each row that `_Rays.case` names, float32."""
    weights = np.zeros(2 * reach + 1, dtype=np.float32)
    distances = {row: row for row in range(2, 2 * reach - 1)}
    distances |= {2 * reach - 1: side + reach, 2 * reach: side}
    for row, distance in distances.items():
        weights[row] = 10 * math.exp(-(distance**2) / (2 * band))
    return weights
