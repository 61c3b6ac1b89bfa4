"""The flags of `simulate` as one table, from the command line or from a TOML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.settings import RunSettings, read_settings
from dafne_federated.core.toml_file import read_toml


def numbers(text: object) -> object:
    """Return the numbers of a text such as ``1,2,4``; anything else as it is.

    Raises:
        ValueError: The text is something else.
    """
    if not isinstance(text, str):
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        msg = "expected numbers with commas between them"
        raise ValueError(msg) from None


def labels_by_site(text: object) -> object:
    """Return the labels by site of a text such as ``site-2:disc,canal;site-3:disc``.

    Raises:
        ValueError: The text is something else.
    """
    if not isinstance(text, str):
        return text
    found: dict[str, tuple[str, ...]] = {}
    for part in text.split(";"):
        site, colon, labels = (word.strip() for word in part.partition(":"))
        names = tuple(name.strip() for name in labels.split(","))
        if not (site and colon and all(names)) or site in found:
            msg = "expected labels by site such as site-2:disc,canal;site-3:disc"
            raise ValueError(msg)
        found[site] = names
    return found


Persons = Annotated[int, Field(ge=1)]


class SimulationOptions(BaseModel):
    """All flags but those of ``RunSettings``; what they mean stands with the command."""

    model_config = DASHED

    data: Path | None = None
    base: Path | None = None
    run: Path | None = None
    base_site: str | None = None
    base_persons: int | None = None
    test_site: str | None = None
    sites: int | None = None
    divide: int | None = None
    sizes: Annotated[tuple[float, ...] | None, BeforeValidator(numbers)] = None
    shares: Annotated[tuple[float, float, float], BeforeValidator(numbers)] = (2.0, 1.0, 1.0)
    without: Annotated[dict[str, tuple[str, ...]], BeforeValidator(labels_by_site)] = Field(
        default_factory=dict
    )
    base_epochs: int = Field(default=60, ge=1)
    base_size: Annotated[int, Field(ge=8)] | None = None
    base_resolution: Annotated[float, Field(gt=0)] | None = None
    phantom_persons: Annotated[tuple[Persons, Persons], BeforeValidator(numbers)] = (10, 8)
    engine: Literal["inline", "ray"] = "inline"
    parallel: int = Field(default=1, ge=1)
    local_only: bool = True
    quiet: bool = False


def read_options(
    path: Path | None, flags: Mapping[str, object]
) -> tuple[SimulationOptions, RunSettings, frozenset[str]]:
    """Return all options, those of training apart, and the names of those that were given.

    Args:
        path: A TOML file with the names of flags, or None.
        flags: What was given on the command line, by name; it wins over the file.

    Raises:
        SettingsError: The file cannot be read, or an option is unknown or out of range.
    """
    values: dict[str, object] = {}
    if path is not None:
        values = read_toml(path)
    training = {name.replace("_", "-") for name in RunSettings.model_fields}
    known = training | {name.replace("_", "-") for name in SimulationOptions.model_fields}
    for name in values:
        if name not in known:
            msg = f"{path}: expected names of flags of simulate, such as 'base-site', got {name!r}"
            raise SettingsError(msg)
    values |= flags
    own = {name: value for name, value in values.items() if name not in training}
    try:
        options = SimulationOptions.model_validate(own)
    except ValidationError as error:
        first = error.errors()[0]
        words = first["msg"].removeprefix("Value error, ")
        msg = f"{first['loc'][0]}: {words}, got {own[str(first['loc'][0])]!r}"
        raise SettingsError(msg) from None
    settings = read_settings(None, **{n: v for n, v in values.items() if n in training})
    return options, settings, frozenset(values)
