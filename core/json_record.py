"""Records in JSON files, checked as they are read."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dafne_federated.core.errors import RunError, first_fault

Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, kind: type[Record], expected: str) -> Record:
    """Return what a file holds.

    Args:
        path: The file.
        kind: What it must be.
        expected: What the folder of the file should be, for the error.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError:
        msg = f"{path}: not found; is {str(path.parent)!r} {expected}?"
        raise RunError(msg) from None
    except ValidationError as error:
        msg = f"{path}: {first_fault(error)}"
        raise RunError(msg) from None
