"""Features of slices on disk: what the frozen part of a network makes of them, computed once.

The features of a set of slices are one folder, named by a digest of everything that they
depend on; a change of any of it is another name. Training reads them through the memory map
of the operating system, so they may be larger than memory.
"""

import contextlib
import json
import logging
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from keras import ops

from dafne_federated.core.files import arrays_digest, private_folder, sha256
from dafne_federated.core.network_layers import Tensor
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.suffix_network import SuffixNetwork

log = logging.getLogger(__name__)

# Raise when the way features are computed or stored changes, so that old files are not used.
_VERSION = 3
_MIB = 2**20
# How many slices the prefix computes at once.
_TOGETHER = (4, 5, 3)


@dataclass(frozen=True)
class CachedSlices:
    """Prepared slices with their features.

    Attributes:
        features: (n, ..) float32 each, n slices, mapped from disk.
        slices: The slices; their images are not read any more.
    """

    features: tuple[npt.NDArray[np.float32], ...]
    slices: PreparedSlices

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.slices)

    def batch(self, chosen: npt.NDArray[np.intp]) -> tuple[list[Tensor], npt.NDArray[np.float32]]:
        """Return features (k, ..) and target (k, rows, columns, channels), float32.

        Features come as tensors, one converted after the other, so that they are in memory
        only once.
        """
        features = [ops.convert_to_tensor(feature[chosen]) for feature in self.features]
        for feature in self.features:
            _forget(feature)
        return features, self.slices.targets(chosen)


class PrefixCache:
    """Features in a folder, within a bound.

    Args:
        folder: Where they are kept; nothing else may be in it.
        limit_mib: The most that all of them together may take, in MiB.
    """

    def __init__(self, folder: Path, limit_mib: float) -> None:
        self.folder = folder
        self.limit = int(limit_mib * _MIB)

    def slices(self, network: SuffixNetwork, slices: PreparedSlices) -> CachedSlices | None:
        """Return ``slices`` with features, computed now or before; None where there is no room.

        Features of other slices or plans that were not used for the longest time make room.
        """
        folder = self.folder / features_key(network, slices)
        try:
            features = _read(folder, network, len(slices))
            if features is None and self._make_room(len(slices) * network.slice_bytes, folder):
                self._fill(folder, network, slices)
                features = _read(folder, network, len(slices))
            if features is None:
                return None
            os.utime(folder)
        except OSError as error:
            log.warning("prefix cache: %s; training without it", error.strerror)
            return None
        return CachedSlices(features, slices)

    def _make_room(self, size: int, folder: Path) -> bool:
        """Return whether ``size`` bytes may be written, after removing what is oldest."""
        private_folder(self.folder)  # features are as private as the images
        shutil.rmtree(folder, ignore_errors=True)  # damaged, else it would have been read
        others = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        sizes = [_size(path) for path in others]
        free = shutil.disk_usage(self.folder).free
        could = free + sum(sizes)  # what others take can be given up
        for room, reason in ((self.limit, "are allowed"), (could, "are free on the disk")):
            if size > room:
                log.info(
                    "prefix cache: %.1f MiB are needed, %.1f MiB %s; training without it",
                    *(size / _MIB, room / _MIB, reason),
                )
                return False
        log.info("prefix cache: keeping %.1f MiB", size / _MIB)
        while sum(sizes) + size > self.limit or size > free:
            shutil.rmtree(others.pop(0), ignore_errors=True)
            free += sizes.pop(0)
        return True

    def _fill(self, folder: Path, network: SuffixNetwork, slices: PreparedSlices) -> None:
        count = len(slices)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=".unfinished-"))
        try:
            with contextlib.ExitStack() as opened:
                files = []
                for index, shape in enumerate(network.shapes):
                    files.append(opened.enter_context(_file(temporary, index).open("wb")))
                    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(files[-1], header)
                # All batches have one size; the last slice fills the last one up.
                sizes = [min(size, count) for size in _TOGETHER]
                together = min(sizes, key=lambda size: -count % size)
                for start in range(0, count, together):
                    chosen = np.minimum(np.arange(start, start + together), count - 1)
                    made = network.features(slices.batch(chosen)[0])
                    for file, feature in zip(files, made, strict=True):
                        file.write(feature[: count - start].astype("<f4", copy=False).tobytes())
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def features_key(network: SuffixNetwork, slices: PreparedSlices) -> str:
    """Return a digest of everything that the features of ``slices`` depend on."""
    plan = network.plan
    parts = [
        _VERSION,
        version("keras"),
        plan.base_digest,
        [target.model_dump(mode="json", exclude={"layer"}) for target in plan.targets],
        network.weights_digest,
        arrays_digest({"images": slices.images, "weights": slices.weights}),
    ]
    return sha256(json.dumps(parts).encode())


def _read(
    folder: Path, network: SuffixNetwork, count: int
) -> tuple[npt.NDArray[np.float32], ...] | None:
    """Return the features in ``folder``; None if they are not there, whole and of this form."""
    features = []
    for index, shape in enumerate(network.shapes):
        try:
            feature = np.load(_file(folder, index), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if feature.shape != (count, *shape) or feature.dtype != np.float32:
            return None
        features.append(feature)
    return tuple(features)


def _forget(feature: npt.NDArray[np.float32]) -> None:
    """Give back the pages that were read: else they count as memory of this process."""
    if isinstance(feature.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        feature.base.madvise(mmap.MADV_DONTNEED)


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index}.npy"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
