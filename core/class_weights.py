"""How often each label occurs, pooled over sites, in the weights of Dafne's loss.

Dafne's weight map is a boundary term plus ``mean frequency / frequency of the label``; see
``core/boundary_weight.py``. A slice set is prepared case by case, so the frequencies are those
of one case, and two sites weigh the same label differently. With the counts of all sites the
second term is what it would be if all slices had been one set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import MessageError, ModelFileError
from dafne_federated.core.slices import PreparedSlices

# The boundary term is 10 * exp(-(d1 + d2)^2 / ..), see ``core/boundary_weight.py``.
_LARGEST_BOUNDARY = 10.0
# What rounding to float32 may leave, as a share of the weight.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class ClassCounts:
    """Pixels of each output channel, background first, and slices that hold any of them."""

    pixels: tuple[int, ...]
    slices: tuple[int, ...]

    def frequencies(self, slice_pixels: int) -> npt.NDArray[np.float64]:
        """Return the share of each channel in the slices that hold it; 0 where none does.

        Source:
            ``input_creation_mem`` in ``dafne_dl/common/preprocess_train.py`` (2.0.2b2).
        """
        pixels, slices = np.array(self.pixels, np.float64), np.array(self.slices, np.float64)
        return pixels / np.maximum(slices * slice_pixels, 1)


def class_counts(slices: PreparedSlices) -> ClassCounts:
    """Return the counts of prepared slices."""
    each = np.stack([np.bincount(s.ravel(), minlength=slices.channels) for s in slices.labels])
    return ClassCounts(tuple(each.sum(axis=0).tolist()), tuple((each > 0).sum(axis=0).tolist()))


def pool_counts(parts: Sequence[ClassCounts]) -> ClassCounts:
    """Return the counts of all parts together; there must be at least one."""
    pixels = zip(*(part.pixels for part in parts), strict=True)
    slices = zip(*(part.slices for part in parts), strict=True)
    return ClassCounts(tuple(map(sum, pixels)), tuple(map(sum, slices)))


def reweighted(slices: PreparedSlices, pooled: ClassCounts) -> PreparedSlices:
    """Return slices whose weights follow the pooled frequencies in place of their own.

    The term of their own frequencies is taken off in float64 and the pooled one added; what
    remains of the rounding of the old weight is 6e-8 of it. A label that the pool does not
    have keeps its own term.

    Args:
        slices: Slices that were prepared as one set: those of one case.
        pooled: Counts of all sites.

    Raises:
        MessageError: The counts cannot be of such slices.
        ModelFileError: The weights are not Dafne's, so there is no such term in them.
    """
    size = slices.labels[0].size
    fits = len(pooled.pixels) == len(pooled.slices) == slices.channels
    if not fits or any(p > s * size for p, s in zip(pooled.pixels, pooled.slices, strict=False)):
        msg = f"the pooled counts are not of {slices.channels} channels in slices of {size} pixels"
        raise MessageError(msg)
    own = class_counts(slices).frequencies(size)
    shared = pooled.frequencies(size)
    before = np.divide(own.mean(), own, out=np.zeros_like(own), where=own > 0)
    after = np.divide(shared.mean(), shared, out=before.copy(), where=shared > 0)
    boundary = slices.weights - before[slices.labels]
    room = _ROUNDING * np.maximum(slices.weights, 1)
    if (boundary < -room).any() or (boundary > _LARGEST_BOUNDARY + room).any():
        msg = (
            "the weights of its slices are not those of Dafne's own preparation, so their class "
            "frequencies cannot be pooled; take class-weights 'case'"
        )
        raise ModelFileError(msg)
    weights = np.maximum(boundary, 0) + after[slices.labels]
    return replace(slices, weights=weights.astype(np.float32))
