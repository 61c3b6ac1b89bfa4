"""Settings of a federation, checked once at the edge; one TOML, the same names as the flags."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.plan import LAYER_CHOICES


class RunSettings(BaseModel):
    """How a federation trains.

    Attributes:
        rounds: Rounds of the federation.
        epochs: Passes of each site over its slices in a round.
        learning_rate: Of Adam at the sites.
        batch_size: Slices in a step.
        strategy: How the server combines updates.
        layers: Which kernels get a low-rank pair.
        rank: Rank of the pairs.
        max_rank: Largest rank accepted from a site.
        scale: The update of a kernel is scale * a @ b.
        seed: All randomness follows from it, the site's name and the round.
        min_sites: A round counts with at least so many sites.
        deadline: Longest wait for a round's answers, in seconds.
        wait: Longest wait for the first ``min_sites`` sites, in seconds.
        threads: CPU threads of one operation, 0 for all cores.
        device: ``auto``, ``cpu`` or ``gpu``.
        max_cases: A site that claims more training cases than this is refused.
        gate: ``validation`` releases only what the sites' validation persons show to be better
            than the base; ``none`` releases the last round unseen, for sites without any.
        margin: With the gate, the most Dice that any label of any site may lose.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    rounds: int = Field(default=5, ge=1, le=10_000)
    epochs: int = Field(default=4, ge=1, le=10_000)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    batch_size: int = Field(default=4, ge=1, le=1024)
    strategy: Literal["product", "factors"] = "product"
    layers: Annotated[str, Field(pattern="^(" + "|".join(LAYER_CHOICES) + ")$")] = "all"
    rank: int = Field(default=4, ge=1, le=256)
    max_rank: int = Field(default=16, ge=1, le=256)
    scale: float = Field(default=1.0, gt=0, le=100)
    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    min_sites: int = Field(default=2, ge=1)
    deadline: float = Field(default=3600.0, gt=0)
    wait: float = Field(default=300.0, gt=0)
    threads: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    max_cases: int = Field(default=100_000, ge=1)
    gate: Literal["validation", "none"] = "validation"
    margin: float = Field(default=0.02, ge=0, le=1)

    @model_validator(mode="after")
    def _rank_within_bound(self) -> Self:
        if self.rank > self.max_rank:
            msg = f"rank: expected at most max-rank {self.max_rank}, got {self.rank}"
            raise ValueError(msg)
        return self


def read_settings(path: Path | None, **given: object) -> RunSettings:
    """Return settings from a TOML file, overridden by what was given on the command line.

    Args:
        path: The file, or None for the defaults.
        **given: Settings by name; None means not given.

    Raises:
        SettingsError: The file cannot be read, or a setting is unknown or out of range.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            msg = f"{path}: cannot read settings: {error}"
            raise SettingsError(msg) from None
    values |= {name.replace("_", "-"): v for name, v in given.items() if v is not None}
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "settings"
        msg = f"{field}: {first['msg']}, got {first['input']!r}"
        raise SettingsError(msg) from None
