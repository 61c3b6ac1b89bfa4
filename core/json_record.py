"""Records in JSON files, checked as they are read."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dafne_federated.core.errors import RunError

Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, kind: type[Record], folder_of: str) -> Record:
    """Return what a file holds.

    Args:
        path: The file.
        kind: What it must be.
        folder_of: What the folder of the file should be of, for the error.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError:
        msg = f"{path}: not found; is {str(path.parent)!r} the folder of a {folder_of}?"
        raise RunError(msg) from None
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise RunError(msg) from None
