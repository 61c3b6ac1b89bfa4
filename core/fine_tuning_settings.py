"""Settings of fine-tuning at one site, checked once at the edge; the names are the flags."""

from typing import Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.settings import RunSettings, falling_rate, read_settings

Schedule = Literal["all", "gradual"]


class FineTuningSettings(BaseModel):
    """How a base is adapted to the images of one site.

    Attributes:
        epochs: At most so many passes over the training slices, all stages together.
        patience: A stage ends after so many epochs without a better validation Dice.
        schedule: ``all`` trains everything that the method trains from the start; ``gradual``
            goes from the output backwards, see ``core/unfreezing.py``.
        learning_rate: Of Adam in the first epoch of a stage; see ``learning_rate_in``.
        batch_size: As in ``RunSettings``, and so are those that follow.
        method: What is trained.
        layers: Which kernels get a low-rank pair.
        last: Layers that method ``last-k`` trains.
        rank: Rank of the pairs.
        scale: The update of a kernel is scale * a @ b.
        statistics: ``base`` leaves the stored statistics of normalisations as they are;
            ``pooled`` sets them, before training, to those of the training slices.
        class_weights: How often a label occurs, in the weights of Dafne's loss: ``case`` as
            Dafne does it, in one case; ``pooled`` in all training slices.
        seed: All randomness follows from it.
        threads: CPU threads of one operation, 0 for all cores.
        device: ``auto``, ``cpu`` or ``gpu``.
        precision: Of the convolutions in training; see ``SuffixNetwork``.
        gate: ``validation`` writes only what validation persons show to be better than the
            base, where there are any; ``none`` writes in any case.
    """

    model_config = DASHED

    epochs: int = Field(default=40, ge=1, le=10_000)
    patience: int = Field(default=10, ge=1)
    schedule: Schedule = "all"
    learning_rate: float = 3e-3
    batch_size: int = 4
    method: str = "lora"
    layers: str = "all"
    last: int = 2
    rank: int = 4
    scale: float = 1.0
    statistics: Literal["base", "pooled"] = "base"
    class_weights: Literal["case", "pooled"] = "case"
    seed: int = 1
    threads: int = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    gate: str = "validation"

    @model_validator(mode="after")
    def _known_to_runs(self) -> Self:
        self.run_settings()
        return self

    def run_settings(self) -> RunSettings:
        """Return these as settings of a run, which says what each may be.

        Raises:
            SettingsError: A setting is out of range.
        """
        shared = self.model_dump(exclude={"patience", "schedule"})
        return read_settings(None, **shared, max_rank=max(self.rank, 1))

    def learning_rate_in(self, epoch: int, epochs: int) -> float:
        """Return the learning rate of ``epoch`` (1 first) of a stage of ``epochs``."""
        return falling_rate(self.learning_rate, epoch, epochs)


def fine_tuning_settings(**given: object) -> FineTuningSettings:
    """Return settings from what was given, by name; None means not given.

    Raises:
        SettingsError: A setting is unknown or out of range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    try:
        return FineTuningSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "settings"
        msg = f"{field.replace('_', '-')}: {first['msg']}, got {first['input']!r}"
        raise SettingsError(msg) from None
