"""Files that are whole or absent, and digests that name their content."""

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt


def write_atomic(path: Path, data: bytes, private: bool = False) -> None:
    """Write ``data`` to ``path`` so that a reader sees all of it or nothing.

    The bytes go to a temporary name in the same folder, are flushed to disk and then
    renamed. Missing parent folders are made. A private file can be read by its owner alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not private:  # what mkstemp makes is
            Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def private_folder(path: Path) -> Path:
    """Make ``path`` a folder that only its owner can look into, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time into the block; the others wait.

    The lock is freed when its process ends, however that ends.

    Args:
        path: A file for the lock alone; made if it is missing.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(key: bytes) -> str:
    """Return what people compare on the telephone: 32 hexadecimal digits in groups of four."""
    digits = sha256(key)[:32]
    return " ".join(digits[start : start + 4] for start in range(0, 32, 4))


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def arrays_digest(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """Return a SHA-256 over names, shapes, dtypes and values, independent of order.

    Two mappings have the same digest exactly if they hold the same bits under the same
    names; how they were stored or in which order they arrived does not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
