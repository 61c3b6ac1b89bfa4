"""What a version of a federation that goes on takes over from those before it.

A version is a run as any other, but that it starts from the state of an earlier one, and that
only the sites with new cases train. The others have no update, and their cases are not to be
forgotten: each site that trained for the state that the version starts from stands in the mean
with that state, and with less weight the longer ago it trained:

    n / sqrt(1 + d)

for n training cases and d releases since the one that it trained for, this one counted. A site
that trains has d = 0; so where all sites train, the mean is that of any run.

Source:
    The weight of stale updates is that of FedBuff, https://arxiv.org/abs/2106.06581, and FedAsync,
    https://arxiv.org/abs/1903.03934 (polynomial, a = 1/2). They weigh changes that were computed
    from an older state; here what is old is the training behind a part of the state itself.
"""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import arrays_digest, write_atomic
from dafne_federated.core.json_record import read_record
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import State, load_state, save_state
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.column_weights import missing_columns


class Absent(BaseModel):
    """A site that trained for the state that a version starts from.

    Attributes:
        cases: Training cases that it had then.
        behind: Releases since, that of the version counted.
        lacks: Labels that it did not annotate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: int = Field(ge=1)
    behind: int = Field(ge=1)
    lacks: tuple[str, ...] = ()


class Continuation(BaseModel):
    """What a version starts from; nothing here changes afterwards.

    Attributes:
        version: Its number, 1 first.
        start_digest: SHA-256 of the state that it starts from.
        new_cases: How many new cases each site announced that trains.
        contained: Who trained for the state that it starts from, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(ge=1)
    start_digest: str
    new_cases: dict[str, int]
    contained: dict[str, Absent] = Field(default_factory=dict)

    @property
    def from_release(self) -> bool:
        """Whether the version starts from an earlier release, not from the base."""
        return bool(self.contained)


def staleness(behind: int) -> float:
    """Return which share of its weight a site keeps that trained ``behind`` releases ago."""
    return 1.0 / math.sqrt(1.0 + behind)


def keep_continuation(folder: RunFolder, record: Continuation, start: State) -> None:
    """Keep what a version starts from, before it begins."""
    save_state(_start(folder), folder.plan(), start)
    write_atomic(_record(folder), record.model_dump_json(indent=2).encode())


def continuation(folder: RunFolder) -> Continuation | None:
    """Return what a run takes over; None if it is no version of a federation that goes on."""
    path = _record(folder)
    return read_record(path, Continuation, "a version") if path.exists() else None


def start_state(folder: RunFolder, record: Continuation) -> State:
    """Return the state that a version starts from.

    Raises:
        StateError: It is missing or damaged.
        RunError: It is another one than that of the record.
    """
    state = load_state(_start(folder))[1]
    if (got := arrays_digest(state)) != record.start_digest:
        msg = f"{_start(folder)}: expected digest {record.start_digest[:16]}, got {got[:16]}"
        raise RunError(msg)
    return state


def stand_ins(
    record: Continuation, plan: AdaptationPlan, start: State, updates: list[Update]
) -> list[Update]:
    """Return what stands for the sites of earlier versions that gave no update in a round."""
    given = {update.site for update in updates}
    return [
        Update(
            site,
            start,
            absent.cases,
            staleness(absent.behind),
            missing_columns(plan, [plan.labels.index(label) + 1 for label in absent.lacks]),
        )
        for site, absent in sorted(record.contained.items())
        if site not in given
    ]


def _record(folder: RunFolder) -> Path:
    return folder.path / "continues.json"


def _start(folder: RunFolder) -> Path:
    return folder.path / "start.npz"
