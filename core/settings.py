"""Settings of a federation, checked once at the edge; one TOML, the same names as the flags."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import AdapterError, SettingsError
from dafne_federated.core.methods import method_parts
from dafne_federated.core.plan import LAYER_CHOICES, WireType
from dafne_federated.core.privacy_accountant import LEAST_NOISE, LEAST_RATE, Mechanism
from dafne_federated.core.privacy_rules import check_person_privacy, check_site_privacy
from dafne_federated.core.strategy_table import (
    STRATEGY_TABLE,
    OptimiserChoice,
    check_combination,
    check_late,
    check_optimisation,
)
from dafne_federated.core.toml_file import read_toml


class RunSettings(BaseModel):
    """How a federation trains.

    Attributes:
        rounds: Rounds of the federation.
        epochs: Passes of each site over its slices in a round.
        learning_rate: Of Adam at the sites in the first round; see ``learning_rate_in``.
        batch_size: Slices in a step.
        strategy: How the server combines updates; see ``core/strategy_table.py``.
        robust: Which updates it leaves out or weighs down before, if any; see there.
        bad_sites: How many bad sites ``robust`` shall bear.
        method: What is trained: a name of the table of methods, or several joined by ``+``.
        layers: Which kernels get a low-rank pair, with method ``lora``.
        last: Layers that method ``last-k`` trains.
        rank: Rank of the pairs; with ``product`` also of the state where sites have their own.
        max_rank: Largest rank accepted from a site.
        scale: The update of a kernel is scale * a @ b.
        wire: How states travel; ``float16`` halves the bytes. The state of each round then has
            the digits of float16, at the sites and in what is released.
        statistics: ``base`` leaves the stored statistics of normalisations as they are;
            ``pooled`` sets them once, before the first round, to those of all training slices
            of the sites that share theirs.
        class_weights: How often a label occurs, in the weights of Dafne's loss: ``case`` as
            Dafne does it, in one case; ``pooled`` in all training slices of these sites.
        privacy: ``none``; ``person``: each site hides each of its persons with noise, and says
            up to which epsilon; ``site``: the server hides each site; see ``PRIVACY.md``.
        noise: With privacy: standard deviation of the noise, a multiple of ``clip``.
        clip: Largest norm of what one ``person`` adds to a step, or one ``site`` to a round.
        person_rate: With ``person``: probability with which a person takes part in a step, with
            at most ``batch_size`` slices; an epoch then has 1 / person_rate steps.
        optimiser: Whether the sites start each round with a ``fresh`` optimiser, or with what
            theirs knew after their last one (``kept``), which never leaves them.
        proximal: How strongly a site holds to the state that it received; see
            ``core/proximal.py``.
        server_optimiser: What the server makes of the change of a round: ``none`` takes it,
            ``momentum`` and ``adam`` remember earlier ones; see ``server/server_optimiser.py``.
        server_rate: How much of its step it takes; by default 1 with ``momentum``, 0.01 with
            ``adam``, whose steps are that large in each value.
        server_momentum: How much of what it remembers stays from round to round.
        local_rank: With strategy ``global+local``, rank of the pairs that stay at each site.
        seed: All randomness follows from it, the site's name and the round.
        min_sites: A round counts with at least so many usable updates; see ``server/quorum.py``.
        sites_per_round: So many sites, drawn anew, train in a round and the others only measure;
            0 for all. See ``server/sampling.py``.
        deadline: A round closes so many seconds after it was sent, or when all have answered.
        grace: So many seconds longer it waits if it has too few usable updates by then.
        retries: So many times a round is asked again of the sites that gave no answer, if it
            still has too few.
        late: What becomes of an update that arrives after its round has closed: ``drop``, or
            ``use`` in the next round; see ``server/late_answers.py``.
        wait: Longest wait for the first ``min_sites`` sites, in seconds.
        threads: CPU threads of one operation, 0 for all cores.
        device: ``auto``, ``cpu`` or ``gpu``.
        precision: Of convolutions while a simulated site trains; see ``SiteSettings``.
        max_cases: More training cases than this are not believed of any site.
        max_norm_ratio: An update that moves the base more than so many times the median of the
            round's updates is refused; needs three sites. Not with privacy ``site``.
        gate: ``validation`` releases only what the sites' validation persons show to be better
            than the base, see ``server/acceptance.py``; ``none`` releases the last round unseen,
            for sites without any.
        margin: With the gate, the most Dice that any label of any site may lose; with one or
            two validation persons at a site, a label moves by some points of itself.
        confidence: With which a larger fall must be excluded, one-sided.
        min_persons: With fewer validation persons who accept, nothing is released.
        reference: Folder of the coordinator's own images that the gate looks at, too; empty for
            none.
    """

    model_config = DASHED

    rounds: int = Field(default=5, ge=1, le=10_000)
    epochs: int = Field(default=4, ge=1, le=10_000)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    batch_size: int = Field(default=4, ge=1, le=1024)
    strategy: str = Field(default="product", max_length=40)
    robust: str = Field(default="none", max_length=40)
    bad_sites: int = Field(default=1, ge=0, le=10_000)
    method: str = Field(default="lora", max_length=40)
    layers: Annotated[str, Field(pattern="^(" + "|".join(LAYER_CHOICES) + ")$")] = "all"
    last: int = Field(default=2, ge=1, le=1000)
    rank: int = Field(default=4, ge=1, le=256)
    max_rank: int = Field(default=16, ge=1, le=256)
    scale: float = Field(default=1.0, gt=0, le=100)
    wire: WireType = "float32"
    statistics: Literal["base", "pooled"] = "base"
    class_weights: Literal["case", "pooled"] = "case"
    privacy: Literal["none", "person", "site"] = "none"
    noise: float = Field(default=2.0, ge=LEAST_NOISE, le=1000)
    clip: float = Field(default=0.1, gt=0, le=1e6)
    person_rate: float = Field(default=0.5, ge=LEAST_RATE, le=1)
    optimiser: OptimiserChoice = "fresh"
    proximal: float = Field(default=0.0, ge=0, le=1e6)
    server_optimiser: Literal["none", "momentum", "adam"] = "none"
    server_rate: float | None = Field(default=None, gt=0, le=100)
    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    local_rank: int = Field(default=2, ge=1, le=256)
    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    min_sites: int = Field(default=2, ge=1)
    sites_per_round: int = Field(default=0, ge=0)
    deadline: float = Field(default=3600.0, gt=0)
    grace: float = Field(default=0.0, ge=0)
    retries: int = Field(default=1, ge=0, le=100)
    late: Literal["drop", "use"] = "drop"
    wait: float = Field(default=300.0, gt=0)
    threads: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    max_norm_ratio: float = Field(default=20.0, gt=1)
    max_cases: int = Field(default=100_000, ge=1)
    gate: Literal["validation", "none"] = "validation"
    margin: float = Field(default=0.05, ge=0, le=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    min_persons: int = Field(default=3, ge=1)
    reference: str = ""

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        try:
            method_parts(method)
        except AdapterError as error:
            raise ValueError(str(error)) from None
        return method

    @field_validator("layers")
    @classmethod
    def _layers_are_for_lora(cls, layers: str, info: ValidationInfo) -> str:
        method = info.data.get("method", "lora")
        if layers != "all" and "lora" not in method_parts(method):
            msg = f"only method 'lora' chooses among layers, not {method!r}"
            raise ValueError(msg)
        return layers

    @field_validator("reference", mode="before")
    @classmethod
    def _reference_from_anywhere(cls, path: str | Path) -> str:
        return str(Path(path).absolute()) if path else ""

    @model_validator(mode="after")
    def _rank_within_bound(self) -> Self:
        if self.rank > self.max_rank:
            msg = f"rank: expected at most max-rank {self.max_rank}, got {self.rank}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _strategy_fits(self) -> Self:
        pairs = "lora" in method_parts(self.method)
        try:
            check_combination(self.strategy, self.robust, self.bad_sites, self.min_sites, pairs)
            check_optimisation(self.strategy, self.server_optimiser, self.proximal)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        whole = self.rank + self.local_rank
        if STRATEGY_TABLE[self.strategy].local and whole > self.max_rank:
            msg = (
                f"strategy {self.strategy!r} trains at rank {self.rank} and local-rank "
                f"{self.local_rank} together; raise max-rank to {whole}, or take smaller ones"
            )
            raise ValueError(msg)
        if self.robust != "none" and "pooled" in (self.statistics, self.class_weights):
            msg = (
                f"robust {self.robust!r} does not cover what sites pool; take statistics 'base' "
                "and class-weights 'case', or robust 'none'"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _privacy_fits(self) -> Self:
        uses = {"none": (), "person": ("noise", "clip", "person_rate"), "site": ("noise", "clip")}
        for name in uses["person"]:
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and name not in uses[self.privacy]:
                flag, of = name.replace("_", "-"), [kind for kind in uses if name in uses[kind]]
                msg = (
                    f"{flag} is for privacy {' or '.join(map(repr, of))}, and privacy is "
                    f"{self.privacy!r}"
                )
                raise ValueError(msg)
        pooled = "pooled" in (self.statistics, self.class_weights)
        try:
            if self.privacy == "person":
                check_person_privacy(pooled, self.optimiser, self.proximal)
            elif self.privacy == "site":
                check_site_privacy(
                    pooled, self.strategy, self.robust, self.sites_per_round, self.late
                )
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _rounds_can_close(self) -> Self:
        if 0 < self.sites_per_round < self.min_sites:
            msg = (
                f"sites-per-round: expected 0 for all, or at least min-sites {self.min_sites}, "
                f"got {self.sites_per_round}"
            )
            raise ValueError(msg)
        try:
            check_late(self.strategy, self.late)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def mechanism(self) -> Mechanism | None:
        """How sites hide their persons, if they do."""
        if self.privacy != "person":
            return None
        return Mechanism(self.noise, self.clip, self.person_rate)

    @property
    def norm_ratio_used(self) -> float:
        """How many times the median an update may be.

        With privacy ``site`` any: whether one site's update counts must not follow from that of
        another, and none counts for more than ``clip``.
        """
        return math.inf if self.privacy == "site" else self.max_norm_ratio

    @property
    def server_rate_used(self) -> float:
        """How much of its step a server optimiser takes."""
        return self.server_rate or {"adam": 0.01}.get(self.server_optimiser, 1.0)

    def learning_rate_in(self, number: int) -> float:
        """Return the learning rate of round ``number``, 1 first.

        It falls over the rounds, so that late ones settle; see ``falling_rate``.
        """
        return falling_rate(self.learning_rate, number, self.rounds)


def falling_rate(first: float, number: int, count: int) -> float:
    """Return the learning rate of step ``number`` (1 first) of ``count`` rounds or epochs.

    It falls along a cosine from ``first`` to a tenth of it in the last one.

    Source:
        The schedule of https://arxiv.org/abs/1608.03983 without restarts.
    """
    done = (number - 1) / max(count - 1, 1)
    return first * (0.1 + 0.45 * (1.0 + math.cos(math.pi * min(done, 1.0))))


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
        values = read_toml(path)
    values |= {name.replace("_", "-"): v for name, v in given.items() if v is not None}
    try:
        return RunSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        msg = f"{field}: {first['msg']}, got {first['input']!r}"
        if not field:  # settings that do not fit each other; the words name them
            msg = first["msg"].removeprefix("Value error, ")
        raise SettingsError(msg) from None
