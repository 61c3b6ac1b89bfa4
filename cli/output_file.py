"""Where a command writes its result, checked before the work is done."""

import tempfile
from pathlib import Path

from dafne_federated.core.errors import SettingsError


def check_output(path: Path, replace: bool = False) -> None:
    """Refuse a path that could not be written later, or that holds a file already.

    Args:
        path: The file to be; missing folders above it will be made when it is written.
        replace: Whether a file that is there may be replaced.

    Raises:
        SettingsError: There is a file or folder of that name, or its folder takes no files.
    """
    if path.is_dir() or (path.exists() and not replace):
        kind = "folder" if path.is_dir() else "file"
        msg = f"{path}: there is a {kind} already; choose another name"
        raise SettingsError(msg)
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise SettingsError(msg) from None
