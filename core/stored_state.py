"""Arrays of a state that stay on disk and are read one at a time, where they are asked for."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import StateError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.state import npz_bytes

# A local file header of the zip format before name and extra field, in bytes.
# Source: APPNOTE.TXT of PKWARE, section 4.3.7.
_LOCAL_HEADER = 30


class StoredState(Mapping[str, npt.NDArray[np.float32]]):
    """A state in a file; each access reads one array, and none is kept.

    Args:
        path: What ``keep_arrays`` wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        shape, offset = self._places()[name]
        values = np.fromfile(self._path, np.float32, int(np.prod(shape)), offset=offset)
        return values.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places())

    def __len__(self) -> int:
        return len(self._places())

    def _places(self) -> dict[str, tuple[tuple[int, ...], int]]:
        try:
            known = self._path.stat()
            return _places(self._path, known.st_mtime_ns, known.st_size)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            msg = f"{self._path.name}: an update that was kept cannot be read: {error}"
            raise StateError(msg) from None


def keep_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.float32]]) -> StoredState:
    """Write arrays as an uncompressed ``.npz`` without pickle, and return them from there."""
    write_atomic(path, npz_bytes(arrays))
    return StoredState(path)


@lru_cache(maxsize=256)
def _places(path: Path, _changed: int, _size: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return shape and offset of each array of a file, by name."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + _LOCAL_HEADER - 4)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            file.seek(name + extra, os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if version != (1, 0) or dtype != np.float32 or info.compress_type:
                msg = f"array {info.filename!r}: expected plain float32, got {dtype}"
                raise ValueError(msg)
            places[info.filename.removesuffix(".npy")] = (shape, file.tell())
    return places
