"""Fine-tuning from images to a new `.model`: persons divided, trained, tested, gated, written."""

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.class_weights import class_counts, pool_counts, reweighted
from dafne_federated.core.dataset import CaseRef, DataFolder, label_names, load_case, split_persons
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import sha256, write_atomic
from dafne_federated.core.fine_tuning import FineTuned, FineTuning, fine_tune, plan_fine_tuning
from dafne_federated.core.fine_tuning_folder import (
    PARTS,
    EpochLine,
    FineTuningFolder,
    FineTuningInfo,
    FineTuningResult,
)
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.merged_model import adapted_model
from dafne_federated.core.model_file import ModelFile, serialise_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.site_labels import site_labels
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.state import State
from dafne_federated.core.versions import versions
from dafne_federated.core.volumes import Case
from dafne_federated.simulations.fine_tuning_labels import base_for, check_labels, own_labels
from dafne_federated.simulations.fine_tuning_report import NEW, write_fine_tuning_report
from dafne_federated.simulations.progress import Advance, Stages, epoch_note
from dafne_federated.simulations.test_results import Overlay, TestRow
from dafne_federated.simulations.testing import measure_case

# Persons are compared as those of one site, whatever their scans are called after.
_ONE_SITE = ""


@dataclass(frozen=True)
class FineTuningJob:
    """What a person asks for.

    Attributes:
        given: A model, approved on this machine.
        labels: Labels of the new model; None for those of the given one.
        data: The images.
        cases: Those of them to use.
        output: The new model file.
        run: Folder of the run.
        settings: How to train.
        shares: Persons for training, validation and test, relative to each other.
        classification: Class of the data as Dafne names it.
        command: What was typed.
    """

    given: ModelFile
    labels: tuple[str, ...] | None
    data: DataFolder
    cases: Sequence[CaseRef]
    output: Path
    run: Path
    settings: FineTuningSettings
    shares: Sequence[float] = (2.0, 1.0, 1.0)
    classification: str = ""
    command: str = ""

    def parts(self) -> dict[str, list[CaseRef]]:
        """Return the cases for training, validation and test; no person is in two parts.

        Raises:
            SettingsError: Nobody is left to train on.
        """
        dealt = split_persons(self.cases, self.shares, self.settings.seed)
        parts = dict(zip(PARTS, dealt, strict=True))
        if not parts["training"]:
            persons = len({ref.person for ref in self.cases})
            msg = f"shares: expected somebody to train on, got nobody of {persons} persons"
            raise SettingsError(f"{msg}; give training a larger share")
        return parts


@dataclass(frozen=True)
class FineTuningOutcome:
    """How it ended.

    Attributes:
        folder: Where everything is kept.
        info: What was started.
        result: How it ended.
        epochs: All epochs.
        rows: Base and new model on test persons.
    """

    folder: FineTuningFolder
    info: FineTuningInfo
    result: FineTuningResult
    epochs: Sequence[EpochLine]
    rows: Sequence[TestRow]


def run_fine_tuning(job: FineTuningJob, stages: Stages) -> FineTuningOutcome:
    """Do the job, or what is left of it in its folder; the backend must be prepared.

    The model is written last, so that the same command again, after whatever happened, ends in
    the same file.

    Raises:
        DafneFederatedError: Something is missing, damaged or does not fit together.
    """
    approvals = Approvals()
    approvals.require(job.given)
    check_labels(job.labels or own_labels(job.given), job.cases, job.data)
    folder, parts = FineTuningFolder(job.run), job.parts()
    with folder.lock():
        base = base_for(job.given, job.labels, job.settings.seed, folder, approvals)
        tuning = plan_fine_tuning(RunningModel(base, approvals), job.settings)
        known = {name for ref in parts["training"] for name in label_names(ref, job.data)}
        here = site_labels(tuning.model.labels, known)
        tuning = replace(tuning, missing=here.missing)
        begun_with = folder.begin(_info(job, tuning, parts), tuning.plan)
        info = begun_with.model_copy(update={"settings": job.settings})  # the gate may be another
        begun = time.monotonic()
        with stages.stage("Preparing images", len(parts["training"] + parts["validation"])) as done:
            training, validation = (
                _prepared(job, tuning, map(here.case, _cases(parts[name], job.data, done)), folder)
                if parts[name]
                else None
                for name in ("training", "validation")
            )
        assert training is not None  # somebody is there to train on
        prepared = time.monotonic() - begun
        tuned = _train(tuning, training, validation, folder, stages)
        begun = time.monotonic()
        tested = parts["test"] if tuned.better else []
        rows, overlays = _test(job, tuning, tuned.state, tested, folder, stages)
        seconds = {
            "preparing": prepared,
            "training": math.fsum(line.seconds for line in tuned.progress.lines),
            "testing": time.monotonic() - begun,
        }
        model = _new_model(info, tuning, tuned)
        data = serialise_model(model) if tuned.better else b""
        result = FineTuningResult(
            written=tuned.better,
            reason=tuned.reason,
            epoch=tuned.epoch,
            base_dice=tuned.progress.base_dice,
            dice=tuned.dice,
            seconds=seconds,
            digest=sha256(data) if data else "",
            content_digest=model.content_digest if data else "",
        )
        table = [row.model_dump(mode="json") for row in rows]
        write_atomic(folder.path / "test.json", json.dumps({"rows": table}, indent=1).encode())
        write_fine_tuning_report(folder, info, tuning.plan, tuned.progress, result, rows, overlays)
        folder.finish(result)
        if data:
            approvals.add(replace(model, digest=result.digest), "fine-tuned on this machine")
            write_atomic(job.output, data)  # last: a file that is there is finished and approved
        folder.clear()
    return FineTuningOutcome(folder, info, result, tuned.progress.lines, rows)


def _info(
    job: FineTuningJob, tuning: FineTuning, parts: Mapping[str, Sequence[CaseRef]]
) -> FineTuningInfo:
    base = tuning.model.file
    return FineTuningInfo(
        run=uuid.uuid4().hex,
        created=int(time.time()),
        base_name=str(base.metadata.get("model_name") or "Model"),
        base_digest=base.digest,
        given_digest=job.given.digest,
        base_parameters=base.parameters,
        plan_digest=tuning.plan.digest,
        settings=job.settings,
        classification=job.classification,
        cases={name: tuple(ref.name for ref in refs) for name, refs in parts.items()},
        persons={name: len({ref.person for ref in refs}) for name, refs in parts.items()},
        versions=versions(),
        command=job.command,
    )


def _prepared(
    job: FineTuningJob, tuning: FineTuning, cases: Iterator[Case], folder: FineTuningFolder
) -> PreparedSlices:
    cache = BiasFieldCache(folder.bias_fields)
    parts = tuning.model.prepare_each(cases, job.classification, cache)
    if job.settings.class_weights == "pooled":
        pooled = pool_counts([class_counts(part) for part in parts])
        parts = [reweighted(part, pooled) for part in parts]
    return concatenate(parts)


def _cases(refs: Sequence[CaseRef], data: DataFolder, done: Advance) -> Iterator[Case]:
    for ref in refs:
        yield load_case(ref, data.labels)
        done(ref.name)


def _train(
    tuning: FineTuning,
    training: PreparedSlices,
    validation: PreparedSlices | None,
    folder: FineTuningFolder,
    stages: Stages,
) -> FineTuned:
    earlier = folder.progress()
    with stages.stage("Training", sum(stage.epochs for stage in tuning.stages)) as advance:

        def note(line: EpochLine) -> None:
            advance(f"{line.stage}: {epoch_note(line.loss, line.dice)}")

        for line in earlier.lines if earlier else ():
            note(line)
        return fine_tune(tuning, training, validation, folder, note)


def _test(
    job: FineTuningJob,
    tuning: FineTuning,
    state: State,
    refs: Sequence[CaseRef],
    folder: FineTuningFolder,
    stages: Stages,
) -> tuple[list[TestRow], list[Overlay]]:
    """Measure base and new model on test persons, in the geometry of their images."""
    rows: list[TestRow] = []
    overlays: list[Overlay] = []
    if not refs:
        return rows, overlays
    adapted = AdaptedNetwork(tuning.model.network, tuning.plan)
    arms = {"base": [tuning.start], NEW: [state]}
    cache = BiasFieldCache(folder.bias_fields)
    with stages.stage("Testing on unseen persons", len(refs)) as advance:
        for ref in refs:
            case = load_case(ref, job.data.labels)
            found, overlay = measure_case(
                tuning.model, adapted, case, _ONE_SITE, arms, cache, job.classification
            )
            rows += found
            overlays.append(overlay)
            advance(ref.name)
    return rows, overlays


def _new_model(info: FineTuningInfo, tuning: FineTuning, tuned: FineTuned) -> ModelFile:
    """Return the base with the state folded in, and how it came about in its metadata."""
    plan, settings, progress = tuning.plan, info.settings, tuned.progress
    training, validation = progress.slices
    told = {
        "run": info.run,
        "base_sha256": info.base_digest,
        "base_name": info.base_name,
        "plan_sha256": info.plan_digest,
        "method": plan.method,
        "rank": plan.rank,
        "strategy": "fine-tuning at one site",
        "schedule": settings.schedule,
        "epochs": len(progress.lines),
        "epoch": tuned.epoch,
        "sites": 1,
        "training_cases": len(info.cases["training"]),
        "training_persons": info.persons["training"],
        "training_slices": training,
        "validation_persons": info.persons["validation"],
        "validation_slices": validation,
        "validation_dice": {"base": progress.base_dice, "new": tuned.dice},
        "statistics": settings.statistics,
        "class_weights": settings.class_weights,
        "precision": settings.precision,
        "seed": settings.seed,
        "software": info.versions,
        "date": datetime.fromtimestamp(info.created, UTC).date().isoformat(),
    }
    if tuning.missing:
        told["labels_not_annotated"] = [plan.labels[channel - 1] for channel in tuning.missing]
    if info.given_digest != info.base_digest:
        told["new_labels_from_sha256"] = info.given_digest
    model = adapted_model(tuning.model.file, plan, tuned.state, info.created)
    return replace(model, metadata={**model.metadata, "federated": told})
