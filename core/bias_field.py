"""Bias-field corrections that are computed once and remembered by content.

The N4 correction is the slowest part of Dafne's preprocessing, and a slice meets it again
in every round, run and evaluation. It is a pure function of image, mask and parameters as
long as the number of threads stays the same, so its result can be looked up.
"""

import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import write_atomic

Array = npt.NDArray[np.generic]

_MIB = 2**20
_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


class BiasFieldCache:
    """Corrected images by content, in memory and, if a folder is given, on disk.

    Memory and folder are bounded by ``limit_mib`` each; the oldest entries go first. The
    files are `.npy` arrays followed by their SHA-256: a file that was cut off or altered
    is noticed, removed and computed again. They hold images of patients: the folder is made
    readable by its owner only, and whoever gives one away gives data away. The same object
    may be used from several threads, the same folder from several processes.

    Args:
        folder: where entries outlive the process; made if missing. None: memory only.
        limit_mib: most MiB to hold.

    Raises:
        SettingsError: the limit is not positive or the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, limit_mib: float = 2048) -> None:
        if not limit_mib > 0:
            msg = f"the limit of the bias-field cache must be positive, got {limit_mib} MiB"
            raise SettingsError(msg)
        self._limit = int(limit_mib * _MIB)
        self._memory: dict[str, Array] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._folder = folder
        self._folder_bytes = 0
        self.hits = 0
        self.misses = 0
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._folder_bytes = sum(size for _, size, _ in self._files())
            except OSError as error:
                msg = f"the folder of the bias-field cache cannot be used: {error.strerror}"
                raise SettingsError(msg) from error

    def get(self, key: str) -> Array | None:
        """Return the array stored under ``key``, None if there is none or it is damaged."""
        with self._lock:
            array = self._memory.get(key)
            if array is None:
                array = self._read(key)
                if array is not None:
                    self._remember(key, array)
            if array is None:
                self.misses += 1
            else:
                self.hits += 1
            return array

    def put(self, key: str, array: Array) -> None:
        """Store ``array`` under ``key``; it must not be changed afterwards.

        A folder that cannot be written, say on a full disk, is given up with a warning:
        the work goes on with the memory alone.
        """
        with self._lock:
            self._remember(key, array)
            if self._folder is None:
                return
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            data = file.getvalue()
            try:
                write_atomic(self._folder / f"{key}.npy", data + hashlib.sha256(data).digest())
                self._folder_bytes += len(data) + _DIGEST_BYTES
                self._shrink_folder()
            except OSError as error:
                _log.warning("bias fields are no longer cached on disk: %s", error.strerror)
                self._folder = None

    def _remember(self, key: str, array: Array) -> None:
        previous = self._memory.pop(key, None)
        self._bytes += array.nbytes - (0 if previous is None else previous.nbytes)
        self._memory[key] = array
        while self._bytes > self._limit and self._memory:
            self._bytes -= self._memory.pop(next(iter(self._memory))).nbytes

    def _read(self, key: str) -> Array | None:
        if self._folder is None:
            return None
        path = self._folder / f"{key}.npy"
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        data, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() == digest:
            array: Array = np.load(io.BytesIO(data), allow_pickle=False)
            return array
        _log.warning("a cached bias field is damaged and is computed again")
        path.unlink(missing_ok=True)
        return None

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return time of writing, size in bytes and path of each entry on disk, oldest first."""
        found = []
        for path in self._folder.glob("*.npy") if self._folder is not None else ():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _shrink_folder(self) -> None:
        if self._folder_bytes <= self._limit:
            return
        files = self._files()
        self._folder_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._folder_bytes <= self._limit:
                return
            path.unlink(missing_ok=True)
            self._folder_bytes -= size


class CachedFilter:
    """A stand-in for SimpleITK's N4 filter that asks a cache before it computes.

    Every setter is passed on to a real filter and noted, in order, as part of the key. A
    question that only an executed filter can answer, such as `GetLogBiasFieldAsImage`,
    makes the real filter run first. Commands added to the filter are called only when it
    runs.

    Args:
        real: an instance of the real filter.
        simpleitk: the module SimpleITK.
        cache: where results are kept.
    """

    def __init__(self, real: Any, simpleitk: Any, cache: BiasFieldCache) -> None:
        self._real = real
        self._simpleitk = simpleitk
        self._cache = cache
        self._settings: list[str] = []
        self._pending: tuple[Any, ...] | None = None

    def __getattr__(self, name: str) -> Any:
        """Return a method of the real filter; setters also become part of the key."""
        if name.startswith("Set") or name.endswith(("On", "Off")):
            return self._setter(name)
        if self._pending is not None:
            self._real.Execute(*self._pending)
            self._pending = None
        return getattr(self._real, name)

    def Execute(self, *images: Any) -> Any:  # noqa: N802, the name is SimpleITK's
        """Return the corrected image.

        Args:
            *images: the image and, if there is one, its mask, both SimpleITK images.
        """
        key = self._key(images)
        found = self._cache.get(key)
        if found is None:
            corrected = self._real.Execute(*images)
            self._pending = None
            self._cache.put(key, self._simpleitk.GetArrayFromImage(corrected))
            return corrected
        self._pending = images
        corrected = self._simpleitk.GetImageFromArray(found)
        corrected.CopyInformation(images[0])
        return corrected

    def _setter(self, name: str) -> Callable[..., Any]:
        method = getattr(self._real, name)

        def set_and_note(*args: Any, **kwargs: Any) -> Any:
            self._settings.append(f"{name} {args!r} {kwargs!r}")
            return method(*args, **kwargs)

        return set_and_note

    def _key(self, images: tuple[Any, ...]) -> str:
        """Return a SHA-256 over everything that the result depends on."""
        sitk = self._simpleitk
        digest = hashlib.sha256()
        facts = {
            "simpleitk": sitk.Version_ExtendedVersionString(),
            "filter": self._real.GetName(),
            "threads": self._real.GetNumberOfThreads(),
            "settings": self._settings,
            "images": [
                [
                    image.GetPixelIDTypeAsString(),
                    image.GetSize(),
                    image.GetSpacing(),
                    image.GetOrigin(),
                    image.GetDirection(),
                ]
                for image in images
            ],
        }
        digest.update(json.dumps(facts).encode())
        for image in images:
            digest.update(np.ascontiguousarray(sitk.GetArrayViewFromImage(image)).data)
        return digest.hexdigest()
