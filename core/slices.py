"""Prepared slices: what a network trains on, after the base model's own preprocessing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PreparedSlices:
    """Slices on the network's grid.

    Attributes:
        images: (n, rows, columns) float32, on the grey scale the network expects.
        labels: (n, rows, columns) uint8, the output channel of each pixel, 0 background.
        weights: (n, rows, columns) float32, how much each pixel counts in the loss.
        channels: Output channels of the network, background included.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32]
    channels: int

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.images)

    def batch(
        self, chosen: npt.NDArray[np.intp]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return input (k, rows, columns, 2) and target (k, rows, columns, channels), float32."""
        inputs = np.stack([self.images[chosen], self.weights[chosen]], axis=-1)
        return inputs, self.targets(chosen)

    def targets(self, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Return the target alone, (k, rows, columns, channels) float32."""
        return np.eye(self.channels, dtype=np.float32)[self.labels[chosen]]

    def without_weights(self) -> "PreparedSlices":
        """Return the slices with a weight map of zeros, as a network sees them in use."""
        return replace(self, weights=np.zeros_like(self.weights))

    def inputs(self) -> npt.NDArray[np.float32]:
        """Return all images as network input without a weight map, (n, rows, columns, 2)."""
        return np.stack([self.images, np.zeros_like(self.images)], axis=-1)


def concatenate(parts: Sequence[PreparedSlices]) -> PreparedSlices:
    """Return the slices of all parts in order; there must be at least one part."""
    return PreparedSlices(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        channels=parts[0].channels,
    )
