"""Bases that came to a site and that nobody approved yet: bytes to look at, never executed."""

from pathlib import Path

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.files import private_folder, sha256, write_atomic

_KEPT = 4  # the newest; a coordinator cannot fill the disk with them


class Inbox:
    """Files named by their digest; the oldest go when there are too many.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, digest: str) -> bool:
        """Return whether the base with this digest is here, whole."""
        path = self._path(digest)
        return path.exists() and sha256(path.read_bytes()) == digest

    def keep(self, data: bytes) -> None:
        """Keep the bytes of a base."""
        private_folder(self.folder)
        write_atomic(self._path(sha256(data)), data, private=True)
        for path in self._newest_first()[_KEPT:]:
            path.unlink()

    def digests(self) -> list[str]:
        """Return the digests of all that wait, the newest first."""
        return [path.stem for path in self._newest_first()]

    def bytes(self, digest: str) -> bytes:
        """Return a base that waits; it may be anything.

        Raises:
            ModelFileError: It is not here, or damaged.
        """
        if not self.has(digest):
            msg = f"no base {digest[:16]} waits at this site"
            raise ModelFileError(msg)
        return self._path(digest).read_bytes()

    def remove(self, digest: str) -> None:
        """Remove a base that does not wait any more."""
        self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.model"

    def _newest_first(self) -> list[Path]:
        found = self.folder.glob("*.model") if self.folder.is_dir() else ()
        return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name))
