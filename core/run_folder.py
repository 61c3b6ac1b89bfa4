"""One run in one folder: settings, plan, a line a round, checkpoints, release, report.

run.json            what was started: settings, digests, versions, command
base.model          the base, as it was
plan.json           the adaptation plan
statistics.json     what the sites pooled before the first round, if they did
rounds.jsonl        one line a round, each whole or absent
events.jsonl        what happened when, for progress bars and people
checkpoints/        the state after each round, with its plan
site-noise.key      what the noise that hides sites follows from, if there is any; secret
updates/            what sites sent in the round that is running, removed when it ends
release/            the `.model` and its side-car, if one was released
result.json         how the run ended
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dafne_federated.core.errors import RunError
from dafne_federated.core.event_lines import append_event, read_events
from dafne_federated.core.files import arrays_digest, private_folder, sha256, write_atomic
from dafne_federated.core.gate_decision import GateDecision
from dafne_federated.core.json_record import read_record
from dafne_federated.core.paired_changes import Changes
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.pooled_statistics import PooledStatistics
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, load_state, save_state
from dafne_federated.core.stored_state import StoredState, keep_arrays


class RunInfo(BaseModel):
    """What a run was started with; nothing here changes afterwards.

    Attributes:
        run: Name of the run, 32 hexadecimal digits.
        created: Seconds since 1970; also the ``timestamp_id`` of the release.
        base_digest: SHA-256 of the base.
        base_name: Name of the base for people.
        plan_digest: SHA-256 of the plan.
        settings: All settings.
        versions: Version by package.
        command: What a person typed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern=r"^[0-9a-f]{32}$")
    created: int
    base_digest: str
    base_name: str
    plan_digest: str
    settings: RunSettings
    versions: dict[str, str]
    command: str


class SiteRound(BaseModel):
    """What one site did in one round.

    Attributes:
        status: ``ok``, ``refused``, ``failed``, ``silent`` until the round closed, or ``late``
            where its update of the round before was used.
        reason: In words, where it is not ok.
        asked: Whether it was asked for an update in a round of training; else it only measured.
        training_cases: Its weight.
        training_slices: Slices trained on; None where the site does not say.
        loss: Loss of the last epoch, on the base's own scale; None where the site does not say.
        seconds: Wall time of training at the site.
        evaluation_seconds: Wall time of evaluation at the site.
        bytes_down: Bytes of records sent to the site.
        bytes_up: Bytes of records it sent.
        dice: Dice of the state that it received, per label; None where not measured.
        dice_cases: Validation cases behind each Dice.
        choose: How the Dice changed from what the run started from, the base or a release, in the
            persons who choose a round.
        accept: The same in those who accept it; see ``core/paired_changes.py``.
        choose_base: After a start from a release, how it changed from the base.
        accept_base: The same in those who accept.
        device: What it ran on.
        update_norm: How far its update moves the base; see ``strategies/outliers.py``.
        share: How much of its weight a robust rule or the cap left; 0 if it was left out.
        epsilon: What the run cost each of its persons so far, where they are hidden.
        delta: Of that epsilon.
        steps: Noisy steps of this round.
        lacks: Labels that nobody annotated there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    status: Literal["ok", "late", "refused", "failed", "silent"]
    reason: str = ""
    asked: bool = True
    training_cases: int = 0
    training_slices: int | None = None
    loss: float | None = None
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    dice: dict[str, float | None] = Field(default_factory=dict)
    dice_cases: dict[str, int] = Field(default_factory=dict)
    choose: Changes = Field(default_factory=dict)
    accept: Changes = Field(default_factory=dict)
    choose_base: Changes = Field(default_factory=dict)
    accept_base: Changes = Field(default_factory=dict)
    device: str = ""
    update_norm: float = 0.0
    share: float = 1.0
    epsilon: float | None = None
    delta: float | None = None
    steps: int | None = None
    lacks: tuple[str, ...] = ()


class RoundLine(BaseModel):
    """One line of ``rounds.jsonl``.

    The Dice in line k belongs to the state that the sites received in round k, that is the
    result of round k - 1; line 1 therefore holds the base. Where statistics were pooled it holds
    the base with these, and the base as it was is in ``statistics.json``. The last line has no
    training and evaluates the final state.

    Attributes:
        round: 1 first.
        trained: Whether sites trained in this round.
        sites: By registered name.
        aggregation_error: See ``strategies.aggregation.Aggregate``; before the state is rounded to
            the type that travels; None without training.
        state_digest: SHA-256 of the state after the round.
        seconds: Wall time of the round at the server.
        whole: Whether every site received the state whole. Else sites of smaller rank measured
            their own cut of it, and it is not released.
        attempts: How often the sites were asked until there were enough usable updates.
        aggregation_seconds: Wall time of combining; 0 without training.
        epsilon: What the run cost each ``unit`` so far, where the server hides it.
        delta: Of that epsilon.
        unit: What is hidden: a ``site``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    round: int
    trained: bool
    sites: dict[str, SiteRound]
    aggregation_error: float | None
    state_digest: str
    seconds: float
    whole: bool = True
    attempts: int = 1
    aggregation_seconds: float = 0.0
    epsilon: float | None = None
    delta: float | None = None
    unit: Literal["site"] | None = None


class RunResult(BaseModel):
    """How a run ended.

    Attributes:
        released: Whether there is a release.
        reason: Why, in words.
        round: The round whose state was released, or None.
        release: File name of the release within ``release/``, or empty.
        release_digest: SHA-256 of its bytes, or empty.
        content_digest: SHA-256 of its weights, identity and sources, or empty.
        base_dice: Dice of the base, by site and label.
        dice: Dice of the chosen state, by site and label.
        decision: What the gate decided, if it was asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    released: bool
    reason: str
    round: int | None
    release: str = ""
    release_digest: str = ""
    content_digest: str = ""
    base_dice: dict[str, dict[str, float | None]]
    dice: dict[str, dict[str, float | None]]
    decision: GateDecision | None = None


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "base.model"
        self.report = path / "report.html"
        self.release = path / "release"
        self.noise_key = path / "site-noise.key"

    @classmethod
    def create(cls, path: Path, info: RunInfo, plan: AdaptationPlan, base: bytes) -> "RunFolder":
        """Make a new run folder.

        Raises:
            RunError: There is a run in ``path`` already.
        """
        folder = cls(private_folder(path))
        if (path / "run.json").exists():
            msg = f"there is a run in {str(path)!r} already; choose another folder or resume it"
            raise RunError(msg)
        write_atomic(folder.base, base)
        write_atomic(path / "plan.json", plan.to_json().encode())
        write_atomic(path / "run.json", info.model_dump_json(indent=2, by_alias=True).encode())
        return folder

    def info(self) -> RunInfo:
        """Return what the run was started with.

        Raises:
            RunError: This is not a run folder, or its file is damaged.
        """
        return read_record(self.path / "run.json", RunInfo, "the folder of a run")

    def plan(self) -> AdaptationPlan:
        """Return the plan; see ``info`` for errors, and: it must be the one of the run."""
        plan = read_record(self.path / "plan.json", AdaptationPlan, "the folder of a run")
        _same(self.path / "plan.json", self.info().plan_digest, plan.digest)
        return plan

    def base_bytes(self) -> bytes:
        """Return the bytes of the base; see ``plan`` for errors."""
        data = self.base.read_bytes()
        _same(self.base, self.info().base_digest, sha256(data))
        return data

    def keep_pooled(self, pooled: PooledStatistics) -> None:
        """Keep what the sites pooled; a run that goes on does not ask again."""
        write_atomic(self.path / "statistics.json", pooled.model_dump_json().encode())

    def pooled(self) -> PooledStatistics | None:
        """Return what the sites pooled, or None before that; see ``info`` for errors."""
        path = self.path / "statistics.json"
        return read_record(path, PooledStatistics, "the folder of a run") if path.exists() else None

    def rounds(self) -> list[RoundLine]:
        """Return the lines of all rounds so far.

        Raises:
            RunError: A line is damaged or missing; the file is only ever written whole.
        """
        path = self.path / "rounds.jsonl"
        lines = []
        texts = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(RoundLine.model_validate_json(text))
            except ValidationError:
                msg = f"{path}: line {number} is damaged; the run cannot go on from it"
                raise RunError(msg) from None
            if lines[-1].round != number:
                msg = f"{path}: expected round {number}, got {lines[-1].round}"
                raise RunError(msg)
        return lines

    def finish_round(self, line: RoundLine, state: State) -> None:
        """Keep the result of a round: first the state, then the line that makes it count."""
        save_state(self._checkpoint(line.round), self.plan(), state)
        kept = [*(old for old in self.rounds() if old.round < line.round), line]
        text = "".join(f"{entry.model_dump_json()}\n" for entry in kept)
        write_atomic(self.path / "rounds.jsonl", text.encode())
        shutil.rmtree(self.path / "updates", ignore_errors=True)

    def keep_update(self, name: str, arrays: Mapping[str, npt.NDArray[np.float32]]) -> StoredState:
        """Put an update on disk until the running round ends, and return it from there."""
        folder = private_folder(self.path / "updates")
        return keep_arrays(folder / f"{sha256(name.encode())[:32]}.npz", arrays)

    def state_after(self, number: int) -> State:
        """Return the state after round ``number``.

        Raises:
            StateError: The checkpoint is missing or damaged.
            RunError: It is not the state that the line of the round names.
        """
        path = self._checkpoint(number)
        state = load_state(path)[1]
        _same(path, self.rounds()[number - 1].state_digest, arrays_digest(state))
        return state

    def finish(self, result: RunResult) -> None:
        """Record how the run ended."""
        write_atomic(self.path / "result.json", result.model_dump_json(indent=2).encode())

    def result(self) -> RunResult:
        """Return how the run ended; see ``info`` for errors."""
        return read_record(self.path / "result.json", RunResult, "the folder of a run")

    def event(self, kind: str, **details: Any) -> None:
        """Append one event for whoever watches."""
        append_event(self.path / "events.jsonl", {"time": time.time(), "event": kind, **details})

    def events(self) -> Iterator[dict[str, Any]]:
        """Return all events so far; a line that is being written is left for the next look."""
        return read_events(self.path / "events.jsonl")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let only one process run the rounds of this folder; freed when the process ends.

        Raises:
            RunError: Another process runs them.
        """
        with (self.path / "lock").open("ab") as file:
            for attempt in range(5):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if attempt < 4:  # it may only be somebody who looks whether it is held
                        time.sleep(0.1)
            else:
                msg = f"another process is running the rounds of {str(self.path)!r}"
                raise RunError(msg)
            yield

    def is_locked(self) -> bool:
        """Return whether some process is running the rounds of this folder."""
        if not (self.path / "lock").exists():
            return False
        with (self.path / "lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def _checkpoint(self, number: int) -> Path:
        return self.path / "checkpoints" / f"round-{number:04d}.npz"


def _same(path: Path, wanted: str, got: str) -> None:
    if wanted != got:
        msg = f"{path}: expected digest {wanted[:16]} as in the record of the run, got {got[:16]}"
        raise RunError(msg)
