"""Settings that people write as TOML: read them, and say what is wrong in which file."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dafne_federated.core.errors import SettingsError, first_fault

Settings = TypeVar("Settings", bound=BaseModel)


def read_toml(path: Path, missing: str = "cannot read settings: no such file") -> dict[str, Any]:
    """Return what a TOML file says.

    Args:
        path: The file.
        missing: What is said, and what to do, where there is none.

    Raises:
        SettingsError: It cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{path}: {missing}"
        raise SettingsError(msg) from None
    except OSError as error:
        msg = f"{path}: cannot read settings: {error.strerror}"
        raise SettingsError(msg) from None
    except ValueError as error:
        msg = f"{path}: cannot read settings: {error}"
        raise SettingsError(msg) from None


def checked(kind: type[Settings], values: object, path: Path) -> Settings:
    """Return values of a file as settings.

    Raises:
        SettingsError: One of them does not fit; with the file, its name and why.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        msg = f"{path}: {first_fault(error)}"
        raise SettingsError(msg) from None
