"""What a benchmark keeps: one JSON line per fit and per test, each whole or absent."""

import fcntl
import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dafne_federated.core.errors import RunError, first_fault


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Score(_Line):
    """One label of one case as the arm segmented it; see ``core/metrics.py``.

    With an arm of sites alone, the figure is that of the model of the person's own site, or the
    mean of those of all sites where the person has none.

    Attributes:
        person: Who was scanned.
        site: Where, as the data says.
        case: Name of the case.
        label: Label name.
        dice: 0 to 1.
        hd95: In mm; None where it was not measured or has no meaning.
        held_out: Whether the site took no part.
    """

    person: str
    site: str
    case: str
    label: str
    dice: float = Field(ge=0, le=1)
    hd95: float | None = None
    held_out: bool = False


class Point(_Line):
    """Where a fit stood after an epoch, round or contribution.

    Attributes:
        epoch: Passes over the training slices until then.
        seconds: Until then, all sites together, in time of the processor on one thread: compiling,
            training, and validation where it was measured. What else runs is not in it, but makes
            it longer all the same where it shares a core or its caches.
        longest: The same if all sites had trained at the same time.
        megabytes: Sent until then, all sites, both ways.
        dice: On the validation persons of all sites, mean over labels; None without any.
    """

    epoch: int
    seconds: float
    longest: float
    megabytes: float
    dice: float | None


class FitLine(_Line):
    """One fit.

    Attributes:
        kind: ``fit``.
        cell: Digest of everything that acts on it.
        scenario: Name of the scenario.
        scenario_digest: SHA-256 of its content.
        arm: Name of the arm.
        variant: Settings that differ from the arm's own.
        seed: Seed of the fit.
        persons: Persons per site, 0 for all.
        fold: Name of the fold.
        curve: Each epoch, round or contribution.
        kept: Which point of the curve was kept, 0 first; -1 for the start.
        parameters: Values that were trained.
        slices: Training slices, all sites together.
        seconds: Wall time of all, preparation and compilation among it.
        cpu_seconds: Time of the processor for the same.
        peak_mib: The most memory that the process had until then.
        versions: Version by package.
        base_digest: SHA-256 of the base.
        scores: On the tuning persons.
    """

    kind: Literal["fit"] = "fit"
    cell: str
    scenario: str
    scenario_digest: str
    arm: str
    variant: dict[str, Any]
    seed: int
    persons: int
    fold: str
    curve: tuple[Point, ...]
    kept: int
    parameters: int
    slices: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    versions: dict[str, str]
    base_digest: str
    scores: tuple[Score, ...]

    @property
    def reached(self) -> Point | None:
        """The point that was kept, the first where that was the start; None without any."""
        return self.curve[max(self.kept, 0)] if self.curve else None


class BaseLine(_Line):
    """The training of the base of a fold.

    Attributes:
        kind: ``base``.
        scenario: Name of the scenario.
        scenario_digest: SHA-256 of its content.
        fold: Name of the fold.
        persons: Persons who trained it and chose its epoch.
        epochs: Epochs that were run.
        dice: Validation Dice of the epoch that was kept.
        seconds: Wall time.
        cpu_seconds: Time of the processor.
        digest: SHA-256 of the base that the arms start from.
    """

    kind: Literal["base"] = "base"
    scenario: str
    scenario_digest: str
    fold: str
    persons: int
    epochs: int
    dice: float | None
    seconds: float
    cpu_seconds: float
    digest: str


class TestLine(_Line):
    """The test of one fit, on persons that nothing was chosen on.

    Attributes:
        kind: ``test``.
        cell: That of the fit.
        scenario: Name of the scenario.
        arm: Name of the arm.
        seed: Seed of the fit.
        persons: Persons per site, 0 for all.
        fold: Name of the fold.
        scores: On test persons, and those of a site that took no part.
    """

    __test__ = False

    kind: Literal["test"] = "test"
    cell: str
    scenario: str
    arm: str
    seed: int
    persons: int
    fold: str
    scores: tuple[Score, ...]


Line = TypeVar("Line", bound=_Line)


def append_line(path: Path, line: _Line) -> None:
    """Add a line; what a kill left of an unfinished one is cut off before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """Return the whole lines of one kind, in order.

    Raises:
        RunError: One of them is damaged.
    """
    lines = []
    wanted = f'"kind":"{kind.model_fields["kind"].default}"'.encode()
    texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, text in enumerate(texts, start=1):
        if not text.startswith(b"{" + wanted):
            continue
        try:
            lines.append(kind.model_validate_json(text))
        except ValidationError as error:
            msg = f"{path}: line {number}: {first_fault(error)}"
            raise RunError(msg) from None
    return lines
