"""Zoom of label masks and their merging into one label map, with Dafne's results, faster.

Source: `zoom(mask, factor, order=0)` as `dafne_dl/common/preprocess_train.py` calls it, and
`calc_aggregated_masks_and_remove_overlap` in that file (dafne-dl 2.0.2b2).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[Any]
MergeFunction = Callable[[Array], tuple[Array, Array]]

_scipy_zoom = ndimage.zoom


def zoom(image: Array, factor: Any, *args: Any, **kwargs: Any) -> Array:
    """Return ``image`` resampled by ``factor`` along each axis.

    Takes the place of `scipy.ndimage.zoom`. Two-dimensional masks at order 0 are taken
    apart by row and column numbers that are computed once for each size and factor; all
    else goes to SciPy.

    Args:
        image: (rows, columns), any dtype.
        factor: one number or one for each axis.
        *args: as in SciPy.
        **kwargs: as in SciPy.
    """
    factors = np.asarray(factor, dtype=np.float64).ravel()
    if (
        args
        or kwargs != {"order": 0}
        or type(image) is not np.ndarray
        or image.ndim != 2
        or not image.dtype.isnative
        or image.dtype.kind not in "bui"
        or image.dtype.itemsize > 4  # SciPy passes through float64, which rounds larger ones
        or factors.size not in (1, 2)
        or np.all(factors == 1)
    ):
        zoomed: Array = _scipy_zoom(image, factor, *args, **kwargs)
        return zoomed
    vertical, horizontal = np.broadcast_to(factors, (2,))
    rows, no_rows = _nearest(image.shape[0], float(vertical))
    columns, no_columns = _nearest(image.shape[1], float(horizontal))
    taken: Array = image.take(rows, axis=0).take(columns, axis=1)
    taken[no_rows] = 0
    taken[:, no_columns] = 0
    return taken


@lru_cache(maxsize=256)
def _nearest(length: int, factor: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the source of each cell along one axis, and the cells that have none.

    SciPy zooms the axes independently, so its own answer for numbered cells holds for
    every image; rounding can push the last cell past the edge, where SciPy writes 0.
    """
    numbered = np.arange(1, length + 1, dtype=np.float64)
    source = _scipy_zoom(numbered, factor, order=0).astype(np.intp) - 1
    return np.maximum(source, 0), np.flatnonzero(source < 0)


def overlap_remover(dafne_function: MergeFunction) -> MergeFunction:
    """Return a faster function with the results of ``dafne_function``.

    Args:
        dafne_function: Dafne's `calc_aggregated_masks_and_remove_overlap`, asked for
            anything but float64 masks.
    """

    def remove_overlap(masks: Array) -> tuple[Array, Array]:
        """Return the label map and the masks without overlap, the latter changed in place.

        Args:
            masks: (rows, columns, labels) float64, plane 0 for the background.
        """
        if masks.dtype != np.float64 or masks.ndim != 3 or not 1 < masks.shape[2] < 256:
            return dafne_function(masks)
        planes = np.ascontiguousarray(np.moveaxis(masks != 0, 2, 0))
        labels = np.zeros(planes.shape[1:], dtype=np.uint8)
        free = ~planes[0]
        for label in range(1, len(planes)):
            taken = planes[label]
            taken &= free
            labels += taken.view(np.uint8) * np.uint8(label)
            free &= ~taken
        planes[0] = free
        masks[...] = np.moveaxis(planes, 0, 2)
        return labels.astype(np.float64), masks

    return remove_overlap
