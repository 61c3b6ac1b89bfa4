"""A scenario: one question, and everything that acts on its answer, in one TOML file."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import DafneFederatedError, SettingsError, first_fault
from dafne_federated.core.files import sha256
from dafne_federated.simulations.benchmark_arms import Arm

PHANTOMS: Final = "phantoms"
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = DASHED


class Fold(_Part):
    """One way to choose centres.

    Attributes:
        held_out: Cases of this site take no part and are tested on at the end.
        base_site: Cases of this site alone train the base.
    """

    held_out: str | None = None
    base_site: str | None = None

    @property
    def name(self) -> str:
        """Name of the fold in results; empty where there is one only."""
        return self.held_out or ""


class Persons(_Part):
    """Who is divided off, in persons, before the rest is dealt to the sites.

    Attributes:
        base: Train the base; 0 with a ``base_site`` takes all of that site.
        tuning: Of the development persons, those on which settings are chosen.
        test: Touched once, at the end.
        phantoms: With phantom limbs: persons drawn for each population.
        folds: Centres that train the base or are held out; each fold is run.
    """

    base: Count = 0
    tuning: Count = 0
    test: Count = 0
    phantoms: dict[str, Count] = Field(default_factory=dict)
    folds: tuple[Fold, ...] = (Fold(),)


class Sites(_Part):
    """How the other persons are dealt.

    Attributes:
        number: So many sites are made up; without it the sites are those of the data.
        sizes: Relative sizes of made-up sites, in persons.
        validation: Persons of each site that choose its epoch or round, and are not trained on.
        persons: Sizes to compare: so many persons of each site train; 0 for all there are.
        wrong_labels: Sites that name each label as the next one, in all they train on.
    """

    number: Annotated[int, Field(ge=1)] | None = None
    sizes: tuple[Share, ...] | None = None
    validation: Count = 1
    persons: tuple[Count, ...] = (0,)
    wrong_labels: tuple[str, ...] = ()


class Network(_Part):
    """The network, and how the base is trained from scratch.

    Attributes:
        size: Rows and columns of the input, in pixels; by default the largest field of view.
        resolution: Pixel size in mm; by default that of the images.
        filters: Channels of each level.
        strides: How much smaller each next level is.
        base_labels: What the base segments: the labels of the data that make up each of its
            own; by default the labels of the data.
        base_epochs: At most so many passes.
        base_patience: The base's training stops after so many without a better Dice.
        base_learning_rate: Of Adam at its start.
        batch_size: Slices in a step of the base's training.
    """

    size: int | None = None
    resolution: float | None = None
    filters: tuple[int, ...] = (8, 16, 32, 64)
    strides: tuple[int, ...] = (2, 2, 2)
    base_labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    base_epochs: int = Field(default=40, ge=1)
    base_patience: int = Field(default=10, ge=1)
    base_learning_rate: float = Field(default=2e-3, gt=0)
    batch_size: int = Field(default=4, ge=1)


class Scenario(_Part):
    """One question.

    Attributes:
        version: Of this form of file.
        question: What the figures answer.
        data: Name of the folder of images, or ``phantoms``.
        every_nth_slice: Only every so manieth slice of a scan is used, in all parts.
        division: Seed of who is where, and of the base.
        seeds: Of the fits; the first one chooses among the variants of an arm.
        descriptive: Whether persons are too few for tests: figures come without them.
        persons: Who is divided off.
        sites: How the others are dealt.
        network: Network and base.
        arms: What is compared, by name.
    """

    version: Literal[1]
    question: str = Field(min_length=1)
    data: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")
    every_nth_slice: int = Field(default=1, ge=1)
    division: int = Field(default=1, ge=0)
    seeds: tuple[Count, ...] = Field(default=(1, 2, 3), min_length=1)
    descriptive: bool = False
    persons: Persons
    sites: Sites
    network: Network = Network()
    arms: dict[str, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, arm in self.arms.items():
            other = self.arms.get(arm.of)
            if arm.where == "ensemble" and (other is None or other.where != "local"):
                msg = f"arm {name!r}: of: expected an arm of sites alone, got {arm.of!r}"
                raise ValueError(msg)
            if arm.with_base and self.network.base_labels:
                msg = f"arm {name!r}: with-base: the base's persons have other labels"
                raise ValueError(msg)
        names = [fold.name for fold in self.persons.folds]
        if len(set(names)) < len(names):
            msg = "folds: expected another held-out site in each"
            raise ValueError(msg)
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the scenario."""
        return sha256(self.model_dump_json(by_alias=True).encode())


def read_scenario(given: str) -> tuple[str, Scenario]:
    """Return name and content of a scenario: a TOML file, or the name of one that comes along.

    Raises:
        SettingsError: There is none, or it does not hold what it should.
    """
    path, known = Path(given), scenarios()
    if path.suffix != ".toml":
        if given not in known:
            msg = f"scenario: expected a .toml file or one of {sorted(known)}, got {given!r}"
            raise SettingsError(msg)
        return given, scenario_of(known[given], given)
    try:
        return path.stem, scenario_of(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot read the scenario: {error}"
        raise SettingsError(msg) from None


def scenarios() -> Mapping[str, str]:
    """Return the texts of the scenarios that come along, by name."""
    folder = files("dafne_federated.simulations") / "scenarios"
    found = [path for path in folder.iterdir() if path.name.endswith(".toml")]
    return {path.name.removesuffix(".toml"): path.read_text(encoding="utf-8") for path in found}


def scenario_of(text: str, where: str) -> Scenario:
    """Return the scenario in a text.

    Raises:
        SettingsError: With the first fault, and ``where`` it is.
    """
    try:
        values: dict[str, Any] = tomllib.loads(text)
        return Scenario.model_validate(values)
    except ValidationError as error:
        msg = f"{where}: {first_fault(error)}"
    except (tomllib.TOMLDecodeError, DafneFederatedError) as error:
        msg = f"{where}: {error}"
    raise SettingsError(msg)
