"""Arms of a benchmark: who trains, what, and by which settings."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import DafneFederatedError, SettingsError
from dafne_federated.core.fine_tuning_settings import FineTuningSettings, fine_tuning_settings
from dafne_federated.core.settings import RunSettings, read_settings
from dafne_federated.core.strategy_table import round_rule

Where = Literal["base", "central", "local", "ensemble", "dafne-merge", "federated"]


class WholeSettings(BaseModel):
    """How all weights of a network are trained, batch statistics among them.

    Attributes:
        epochs: At most so many passes; with ``dafne-merge``, in each contribution.
        patience: Stop after so many without a better validation Dice.
        batch_size: Slices in a step.
        learning_rate: Of Adam at the start.
        contributions: With ``dafne-merge``: how often a site takes the newest model, trains it
            and sends it back, one after the other.
        accept: With ``dafne-merge``, which merged models become the newest: ``all``, those above
            a ``threshold``, or those that are not ``worse``.
        threshold: Least validation Dice.
    """

    model_config = DASHED

    epochs: int = Field(default=40, ge=1)
    patience: int = Field(default=10, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    contributions: int = Field(default=10, ge=1)
    accept: Literal["all", "threshold", "not-worse"] = "all"
    threshold: float = Field(default=0.0, ge=0, le=1)


class Arm(BaseModel):
    """One arm.

    Attributes:
        where: ``base``: nobody trains; ``central``: all images in one place; ``local``: each
            site alone; ``ensemble``: the mean probability of what ``of`` trained at the sites;
            ``dafne-merge``: whole models, averaged half and half one after the other, as Dafne
            does today; ``federated``.
        trains: ``scratch``: all weights from random ones; ``whole``: all weights and batch
            statistics from the base; ``adapter``: a method of the table from the base.
        with_base: Whether the persons who trained the base are trained on as well.
        of: For ``ensemble``: name of a local arm.
        settings: By the names of flags: of ``WholeSettings``, with ``adapter`` of
            ``FineTuningSettings``, with ``federated`` of ``RunSettings``.
        variants: Settings to choose from; the choice is made on tuning persons, for the first
            seed, and for each size by itself.
    """

    model_config = DASHED

    where: Where
    trains: Literal["nothing", "scratch", "whole", "adapter"]
    with_base: bool = False
    of: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = Field(default=({},), min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        allowed: dict[Where, tuple[str, ...]] = {
            "base": ("nothing",),
            "central": ("scratch", "whole", "adapter"),
            "local": ("scratch", "whole", "adapter"),
            "ensemble": ("nothing",),
            "dafne-merge": ("whole",),
            "federated": ("adapter",),
        }
        if self.trains not in allowed[self.where]:
            msg = f"trains: {self.where!r} expects one of {allowed[self.where]}"
            raise ValueError(f"{msg}, got {self.trains!r}")
        if self.with_base and self.where != "central":
            msg = f"with-base: only a central arm has the images of the base, not {self.where!r}"
            raise ValueError(msg)
        if len(self.variants) > 1 and self.trains == "nothing":
            msg = f"variants: {self.where!r} trains nothing that could be chosen"
            raise ValueError(msg)
        try:
            for variant in self.variants:
                self.chosen(variant, 1)
        except DafneFederatedError as error:
            raise ValueError(str(error)) from None
        return self

    def chosen(
        self, variant: Mapping[str, Any], seed: int
    ) -> WholeSettings | FineTuningSettings | RunSettings:
        """Return all settings of a fit.

        Raises:
            SettingsError: One is unknown, out of range, or does not go with the others.
        """
        values = {key.replace("-", "_"): v for key, v in {**self.settings, **variant}.items()}
        if self.where == "federated":
            settings = read_settings(None, **_ON_ONE_CORE | {"gate": "none"} | values, seed=seed)
            if round_rule(settings.strategy, 1).personal or settings.strategy == "global+local":
                msg = f"strategy {settings.strategy!r} has no model for persons of other sites"
                raise SettingsError(msg)
            return settings
        if self.trains == "adapter":
            return fine_tuning_settings(**_ON_ONE_CORE | values, seed=seed)
        try:
            return WholeSettings.model_validate(values)
        except ValueError as error:
            raise SettingsError(" ".join(str(error).split())) from None


_ON_ONE_CORE: dict[str, Any] = {"threads": 1, "device": "cpu"}
