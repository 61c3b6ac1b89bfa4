"""One fine-tuning in one folder: what was started, a line an epoch, where to go on, the result.

run.json            what was started: settings, digests, cases, versions, command
plan.json           the whole adaptation plan
base.model          the base with a new output layer, where labels are new
checkpoint.npz      all that a later process needs to go on after the last epoch
epochs.jsonl        one line an epoch
bias-fields/        corrected images; features/ holds what frozen layers make of slices
test.json           base and new model on test persons, a line for each case and label
result.json         how it ended
report.html         all of it for people
"""

import contextlib
import fcntl
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import private_folder, write_atomic
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.json_record import read_record
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State

PARTS = ("training", "validation", "test")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FineTuningInfo(_Record):
    """What a fine-tuning was started with; nothing here changes afterwards.

    Attributes:
        run: Name of the run, 32 hexadecimal digits.
        created: Seconds since 1970; also the ``timestamp_id`` of the new model.
        base_name: Name of the base for people.
        base_digest: SHA-256 of the base.
        given_digest: SHA-256 of the model that was given: the base, or where labels are new
            the model whose output layer was replaced.
        base_parameters: Values of the base.
        plan_digest: SHA-256 of the plan.
        settings: How it trains.
        classification: Class of the data as Dafne names it.
        cases: Names of the cases of each part.
        persons: Persons of each part.
        versions: Version by package.
        command: What a person typed.
    """

    run: str
    created: int
    base_name: str
    base_digest: str
    given_digest: str
    base_parameters: int
    plan_digest: str
    settings: FineTuningSettings
    classification: str
    cases: dict[str, tuple[str, ...]]
    persons: dict[str, int]
    versions: dict[str, str]
    command: str


class EpochLine(_Record):
    """One epoch.

    Attributes:
        epoch: 1 first, over all stages.
        stage: Name of the stage.
        parameters: Values that the stage trains.
        features: Whether only the part behind the frozen prefix ran.
        learning_rate: Of Adam.
        loss: Mean over the steps, on the base's own scale.
        dice: On the validation slices, mean over labels; None without any.
        best: Whether its state is the best so far, the base included.
        seconds: Wall time of the epoch, validation included.
    """

    epoch: int
    stage: str
    parameters: int
    features: bool
    learning_rate: float
    loss: float
    dice: float | None
    best: bool
    seconds: float


class FineTuningResult(_Record):
    """How a fine-tuning ended.

    Attributes:
        written: Whether there is a new model.
        reason: Why, in words.
        epoch: The epoch whose state was taken; 0 for the base.
        base_dice: Validation Dice of the base; None without validation persons.
        dice: That of the state which was taken.
        seconds: Wall time by what it was spent on.
        digest: SHA-256 of the new model, or empty.
        content_digest: The same without times, or empty.
    """

    written: bool
    reason: str
    epoch: int
    base_dice: float | None
    dice: float | None
    seconds: dict[str, float]
    digest: str = ""
    content_digest: str = ""


class _Head(_Record):
    """The part of a checkpoint that is not arrays."""

    slices_digest: str
    slices: tuple[int, int]
    base_dice: float | None
    lines: list[EpochLine]


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning stands.

    Attributes:
        slices_digest: Digest of the prepared slices.
        slices: Number of training and of validation slices.
        base_dice: Validation Dice of the base.
        lines: The epochs so far.
        state: The whole state after the last of them.
        best: The best whole state so far, the base's included.
        optimiser: What the optimiser knows, see ``AdapterTraining.optimiser``.
    """

    slices_digest: str
    slices: tuple[int, int]
    base_dice: float | None
    lines: list[EpochLine]
    state: State
    best: State
    optimiser: Mapping[str, npt.NDArray[np.generic]]


class FineTuningFolder:
    """Reads and writes the files of one fine-tuning.

    Args:
        path: The folder; made if missing, and readable by its owner only: it holds images.

    Raises:
        RunError: There is such a folder, and it holds something else.
    """

    def __init__(self, path: Path) -> None:
        known = any((path / name).exists() for name in ("run.json", "lock", "checkpoint.npz"))
        if path.exists() and not known and any(path.iterdir()):
            msg = f"{path}: expected a folder of a run, or none, got one that holds other files"
            raise RunError(f"{msg}; choose another --run")
        self.path = private_folder(path)
        self.base = path / "base.model"
        self.report = path / "report.html"
        self.features = path / "features"
        self.bias_fields = path / "bias-fields"

    @property
    def started(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "run.json").exists()

    def begin(self, info: FineTuningInfo, plan: AdaptationPlan) -> FineTuningInfo:
        """Return the record of this run: ``info``, or that of the same run begun before.

        Raises:
            RunError: A run with other settings, another base or other cases is in the folder.
        """
        path = self.path / "run.json"
        if not self.started:
            write_atomic(self.path / "plan.json", plan.to_json().encode())
            write_atomic(path, info.model_dump_json(indent=2, by_alias=True).encode())
            return info
        kept = self.info()
        old, new = _compared(kept), _compared(info)
        for name, value in old.items():
            if new[name] != value:
                msg = (
                    f"{self.path}: the run was started with {name} {json.dumps(value)}, "
                    f"got {json.dumps(new[name])}; choose another --run folder"
                )
                raise RunError(msg)
        return kept

    def info(self) -> FineTuningInfo:
        """Return what was started.

        Raises:
            RunError: This is no such folder, or its file is damaged.
        """
        return read_record(self.path / "run.json", FineTuningInfo, "the folder of a fine-tuning")

    def keep(self, progress: Progress) -> None:
        """Keep where the run stands, all or nothing."""
        head = _Head(
            slices_digest=progress.slices_digest,
            slices=progress.slices,
            base_dice=progress.base_dice,
            lines=progress.lines,
        )
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"head": np.frombuffer(head.model_dump_json().encode(), np.uint8)}
        arrays |= {f"state/{key}": array for key, array in progress.state.items()}
        arrays |= {f"best/{key}": array for key, array in progress.best.items()}
        arrays |= {f"optimiser/{key}": array for key, array in progress.optimiser.items()}
        np.savez(buffer, **arrays)
        write_atomic(self._checkpoint, buffer.getvalue())
        text = "".join(f"{line.model_dump_json()}\n" for line in progress.lines)
        write_atomic(self.path / "epochs.jsonl", text.encode())

    def progress(self) -> Progress | None:
        """Return where the run stands; None before its first epoch has ended.

        Raises:
            RunError: The checkpoint is damaged.
        """
        if not self._checkpoint.exists():
            return None
        try:
            with np.load(self._checkpoint, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            head = _Head.model_validate_json(arrays.pop("head").tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            msg = f"{self._checkpoint}: damaged ({type(error).__name__}); choose another --run"
            raise RunError(msg) from None

        def group(name: str) -> dict[str, npt.NDArray[Any]]:
            start = f"{name}/"
            return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}

        return Progress(
            slices_digest=head.slices_digest,
            slices=head.slices,
            base_dice=head.base_dice,
            lines=head.lines,
            state=group("state"),
            best=group("best"),
            optimiser=group("optimiser"),
        )

    def finish(self, result: FineTuningResult) -> None:
        """Record how the run ended."""
        write_atomic(self.path / "result.json", result.model_dump_json(indent=2).encode())

    def clear(self) -> None:
        """Remove what only training and testing needed: it is as private as the images."""
        for path in (self.features, self.bias_fields):
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let only one process work in this folder; freed when the process ends.

        Raises:
            RunError: Another process does.
        """
        with (self.path / "lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                msg = f"another process is working in {str(self.path)!r}"
                raise RunError(msg) from None
            yield

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.npz"


def _compared(info: FineTuningInfo) -> dict[str, Any]:
    """Return what must be the same when a run goes on, by the name that a person knows.

    The plan follows from it; its digest does not: it covers names of layers, which Keras
    counts up from network to network.
    """
    settings = info.settings.model_dump(mode="json", by_alias=True, exclude={"device", "gate"})
    return settings | {
        "model": info.given_digest[:16],
        "base": info.base_digest[:16],
        "classification": info.classification,
        **{f"{name} cases": list(info.cases[name]) for name in PARTS},
    }
