"""Messages between server and sites.

A message has a typed half, defined here, and where needed an ``ArrayRecord``. Numbers travel
in Flower's ``MetricRecord``, everything else in a ``ConfigRecord``. Arrays are taken out by
the update gate, never by code that trusts them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import MessageError
from dafne_federated.core.plan import Sha256, WireType
from dafne_federated.core.privacy_accountant import LEAST_NOISE, LEAST_RATE, Mechanism
from dafne_federated.core.strategy_table import Factors, OptimiserChoice, RoundRule

PROTOCOL = 1
QUERY_ALIVE = "query.alive"  # without content, and answered without
QUERY_OFFER = "query.offer"
TRAIN_BASE = "train.base"
TRAIN_ROUND = "train.round"
EVALUATE_STATE = "evaluate.state"
QUERY_STATISTICS = "query.statistics"

# No control characters and no line separators: the text goes into records and terminals.
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f\u{2028}\u{2029}]*$"
Reason = Annotated[str, Field(max_length=500, pattern=_PLAIN)]
Version = Annotated[str, Field(max_length=40)]
Counts = Annotated[list[Annotated[int, Field(ge=0, le=2**53)]], Field(max_length=256)]
_MEASURED = frozenset(
    {"training-cases", "training-slices", "loss", "seconds", "dice", "dice-cases"}
)
_MEASURED |= {"evaluation-seconds", "change-persons", "change-total", "change-squares"}
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]


class WireMessage(BaseModel):
    """Base of all messages: immutable, no coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(**DASHED, strict=True)
    metrics: ClassVar[frozenset[str]] = frozenset()

    def to_record(
        self, arrays: Mapping[str, npt.NDArray[Any]] | ArrayRecord | None = None
    ) -> RecordDict:
        """Return the records that carry this message, with ``arrays`` beside it if given."""
        fields = {k: v for k, v in self.model_dump(by_alias=True).items() if v is not None}
        numbers = {key: fields.pop(key) for key in sorted(self.metrics & fields.keys())}
        content = RecordDict({"message": ConfigRecord(fields)})
        if self.metrics:
            content["metrics"] = MetricRecord(numbers)
        if isinstance(arrays, ArrayRecord):
            content["arrays"] = arrays
        elif arrays is not None:
            content["arrays"] = array_record(arrays)
        return content

    @classmethod
    def from_record(cls, content: RecordDict) -> Self:
        """Read and check a message; its arrays are left alone.

        Raises:
            MessageError: A record or field is missing, unknown or out of range.
        """
        try:
            fields = dict(content.config_records["message"])
            numbers = dict(content.metric_records["metrics"]) if cls.metrics else {}
        except KeyError as error:
            msg = f"{cls.__name__}: no record {error}; got {sorted(content)}"
            raise MessageError(msg) from None
        if set(numbers) - cls.metrics or set(fields) & cls.metrics:
            msg = f"{cls.__name__}: expected the numbers {sorted(cls.metrics)} among the metrics"
            raise MessageError(msg)
        if "protocol" not in fields:
            msg = f"{cls.__name__}: protocol: expected {PROTOCOL}, got nothing"
            raise MessageError(msg)
        try:
            return cls.model_validate(fields | numbers)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            msg = f"{cls.__name__}: {field}: {first['msg']}, got {str(first['input'])[:80]!r}"
            raise MessageError(msg) from None


class Offer(WireMessage):
    """What the server proposes to a site before anything else.

    Attributes:
        protocol: Version of these messages; both sides must agree.
        software: Version of this package at the server; see ``core/handshake.py``.
        flower: That of Flower.
        keras: That of Keras.
        tensorflow: That of TensorFlow.
        run: Name of the run, 32 hexadecimal digits.
        base_digest: SHA-256 of the base ``.model``.
        base_bytes: Its size.
        plan: The adaptation plan as JSON.
    """

    protocol: Literal[1] = 1
    software: Version
    flower: Version
    keras: Version
    tensorflow: Version
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    base_digest: Sha256
    base_bytes: int = Field(ge=1)
    plan: str = Field(max_length=4_000_000)


class OfferReply(WireMessage):
    """A site's answer: it has the base, needs it, or does not take part and says why.

    ``rank`` is that of its low-rank pairs, where it chose one of its own.
    """

    protocol: Literal[1] = 1
    software: Version
    flower: Version
    keras: Version
    tensorflow: Version
    site: SiteName
    status: Literal["have", "need", "refused", "failed"]
    reason: Reason = ""
    training_cases: int = Field(ge=0)
    validation_cases: int = Field(ge=0)
    rank: int | None = Field(default=None, ge=1)


class BaseModelBytes(WireMessage):
    """The base itself; the bytes travel as one uint8 array named ``base``."""

    protocol: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    base_digest: Sha256


class BaseReply(WireMessage):
    """Whether the site stored the base."""

    protocol: Literal[1] = 1
    site: SiteName
    status: Literal["stored", "refused", "failed"]
    reason: Reason = ""


class RoundRequest(WireMessage):
    """Train from the state that comes along, and evaluate that state first.

    With ``epochs`` 0 the state is only evaluated. ``trained`` and ``sent`` say which factors of
    low-rank pairs move and which come back; see ``core/strategy_table.py``.

    Attributes:
        wire: How the values of states travel with this message and with its answer.
        class_pixels: Pixels of each output channel at all sites, background first, where the
            sites pooled them; a site then weighs labels by these counts.
        class_slices: Slices that hold each of them.
        noise: Where each person is to be hidden: the noise, a multiple of ``clip``. Without it
            there is none, and no clip and no rate.
        clip: Largest norm of what one person adds to a step.
        person_rate: Probability with which a person takes part in a step.
        optimiser: Whether the site keeps its optimiser from round to round.
        proximal: How strongly it holds to the state that comes along; see ``core/proximal.py``.
        local_rank: Rank of what each site adds for itself; see ``core/local_part.py``.
        first: Whether the state that the run started from comes along, too, as arrays ``first``,
            for the site to compare with before it compares with the base.
    """

    protocol: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1)
    base_digest: Sha256
    plan_digest: Sha256
    epochs: int = Field(ge=0, le=10_000)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    seed: int = Field(ge=0)
    wire: WireType = "float32"
    trained: Factors = "both"
    sent: Factors = "both"
    class_pixels: Counts | None = None
    class_slices: Counts | None = None
    optimiser: OptimiserChoice = "fresh"
    proximal: float = Field(default=0.0, ge=0)
    local_rank: int = Field(default=0, ge=0, le=256)
    noise: float | None = Field(default=None, ge=LEAST_NOISE, le=1000)
    clip: float | None = Field(default=None, gt=0, le=1e6)
    person_rate: float | None = Field(default=None, ge=LEAST_RATE, le=1)
    first: bool = False

    @model_validator(mode="after")
    def _whole_mechanism(self) -> Self:
        if len({value is None for value in (self.noise, self.clip, self.person_rate)}) > 1:
            msg = "expected noise, clip and person-rate together, or none of them"
            raise ValueError(msg)
        return self

    @property
    def mechanism(self) -> Mechanism | None:
        """How each person is to be hidden, if at all."""
        if self.noise is None or self.clip is None or self.person_rate is None:
            return None
        return Mechanism(self.noise, self.clip, self.person_rate)

    @property
    def states(self) -> int:
        """With how many states a site compares: the base, and ``first`` if it comes along."""
        return 1 + self.first

    @property
    def rule(self) -> RoundRule:
        """What moves in this round."""
        return RoundRule(self.trained, self.sent)

    @property
    def classes(self) -> ClassCounts | None:
        """The pooled counts of the classes, if they came along."""
        if not self.class_pixels or not self.class_slices:
            return None
        return ClassCounts(tuple(self.class_pixels), tuple(self.class_slices))


class StatisticsRequest(WireMessage):
    """Ask for counts of classes, or for the moments of what one normalisation is given.

    The new statistics of the normalisations in front of it come along as arrays.

    Attributes:
        what: Which of both.
        number: The normalisation, 0 for the first of the plan; 0 for the classes.
    """

    protocol: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    base_digest: Sha256
    plan_digest: Sha256
    what: Literal["classes", "moments"]
    number: int = Field(ge=0, le=9999)


class StatisticsReply(WireMessage):
    """A site's counts, or its moments: those travel as arrays ``mean`` and ``variance``, float64.

    Attributes:
        status: ``ok``, ``withheld`` (the site shares no statistics but takes part),
            ``refused`` (by the site's other rules) or ``failed``.
        reason: In words, without paths or names of persons.
        slices: Training slices that it is about.
        class_pixels: Pixels of each output channel, background first.
        class_slices: Slices that hold each of them.
    """

    metrics: ClassVar[frozenset[str]] = frozenset({"slices", "class-pixels", "class-slices"})

    protocol: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    site: SiteName
    base_digest: Sha256
    plan_digest: Sha256
    what: Literal["classes", "moments"]
    number: int = Field(ge=0, le=9999)
    status: Literal["ok", "withheld", "refused", "failed"]
    reason: Reason = ""
    slices: int = Field(default=0, ge=0)
    class_pixels: Counts = Field(default_factory=list)
    class_slices: Counts = Field(default_factory=list)


class RoundReply(WireMessage):
    """What a site reports of one round; its update travels as arrays.

    Attributes:
        status: ``ok``, ``refused`` (by the site's own rules) or ``failed``.
        reason: In words, without paths or names of persons.
        device: What it ran on.
        training_cases: Cases trained on: the site's weight.
        training_slices: Slices trained on; None where persons are hidden.
        loss: Mean loss of the last epoch, on the base's own scale; None where persons are hidden.
        seconds: Wall time of training.
        evaluation_seconds: Wall time of evaluating the received state.
        dice: Dice of the received state on the site's validation cases, per label of the plan.
        dice_cases: In how many cases each label could be measured; 0 makes its Dice void.
        change_persons: In how many validation persons the Dice could be compared with that of the
            base: for each label in those who choose a round, then in those who accept it. Where
            ``first`` came along, all of this for that state, then for the base.
        change_total: Sum of these persons' differences; see ``core/paired_changes.py``.
        change_squares: Sum of their squares.
        unit: Whom the noise hides, where the round asked for it.
        epsilon: What this run cost each of them so far, an upper bound; see ``PRIVACY.md``.
        delta: Of that epsilon.
        steps: Noisy steps of this round.
        missing: Output channels, 1 first, of the labels that nobody annotated at this site: they
            were masked out of its loss. Not there if it annotated all, nor from a site that
            hides persons and whose people did not say which.
    """

    metrics: ClassVar[frozenset[str]] = _MEASURED | {"epsilon", "delta", "steps"}

    protocol: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    round: int = Field(ge=1)
    site: SiteName
    base_digest: Sha256
    plan_digest: Sha256
    status: Literal["ok", "refused", "failed"]
    reason: Reason = ""
    device: str = Field(default="", max_length=100, pattern=_PLAIN)
    training_cases: int = Field(default=0, ge=0)
    training_slices: int | None = Field(default=None, ge=0)
    loss: float | None = None
    seconds: float = Field(default=0.0, ge=0)
    evaluation_seconds: float = Field(default=0.0, ge=0)
    dice: list[Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=list)
    dice_cases: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    change_persons: list[Annotated[int, Field(ge=0, le=100_000)]] = Field(default_factory=list)
    change_total: list[Annotated[float, Field(ge=-1e5, le=1e5)]] = Field(default_factory=list)
    change_squares: list[Annotated[float, Field(ge=0, le=1e5)]] = Field(default_factory=list)
    unit: Literal["person"] | None = None
    epsilon: float | None = Field(default=None, ge=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    steps: int | None = Field(default=None, ge=1)
    missing: list[Annotated[int, Field(ge=1, le=255)]] | None = Field(default=None, max_length=255)


def plain(text: object) -> str:
    """Return text for a ``Reason``: printable characters only, at most 500 of them.

    An error may quote names that the other side chose.
    """
    return "".join(c if c.isprintable() else "?" for c in str(text)[:500])


def array_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Return arrays as a Flower record, in the order of their names."""
    return ArrayRecord({k: Array(np.ascontiguousarray(arrays[k])) for k in sorted(arrays)})


def record_bytes(content: RecordDict) -> int:
    """Return the size of all records of a message in bytes, without Flower's own envelope."""
    return sum(
        int(record.count_bytes()) if isinstance(record, ArrayRecord) else len(record.deflate())
        for record in content.values()
    )
