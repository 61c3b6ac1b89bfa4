"""Adapt a base to the images of one site, epoch by epoch, and keep the best state.

The whole state travels through all stages: a stage trains its own part of it and leaves the
rest as it is, so what comes out is always a state of the whole plan.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.batch_statistics import recalibrate
from dafne_federated.core.errors import RunError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.fine_tuning_folder import EpochLine, FineTuningFolder, Progress
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.network_layers import describe_layers
from dafne_federated.core.new_run import make_plan
from dafne_federated.core.partial_labels import marginal_loss
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.state import State, initial_state
from dafne_federated.core.suffix_training import SuffixTraining
from dafne_federated.core.training import AdapterTraining, Part
from dafne_federated.core.unfreezing import Stage, part_of, stages

OnEpoch = Callable[[EpochLine], None]

# The most that features of slices may take on disk while training, in MiB.
_FEATURES_MIB = 8192


@dataclass(frozen=True)
class FineTuning:
    """What is trained on which base; made before the network gets its first adapter.

    Attributes:
        model: The base.
        plan: The whole plan.
        stages: Its stages.
        settings: How it trains.
        missing: Channels of labels that the data does not know; see ``core/partial_labels.py``.
    """

    model: RunningModel
    plan: AdaptationPlan
    stages: tuple[Stage, ...]
    settings: FineTuningSettings
    missing: tuple[int, ...] = ()

    @property
    def start(self) -> State:
        """The whole state before the first epoch; it changes nothing."""
        return initial_state(self.plan, self.settings.seed)


@dataclass(frozen=True)
class FineTuned:
    """What came out.

    Attributes:
        state: The state to take, of the whole plan.
        epoch: The epoch after which it was that; 0 for the base itself.
        dice: Its validation Dice, mean over labels; None without validation slices.
        better: Whether it may be written: its Dice is above the base's, or nobody could tell.
        reason: Why, in words.
        progress: All epochs, and the base's Dice.
    """

    state: State
    epoch: int
    dice: float | None
    better: bool
    reason: str
    progress: Progress


def plan_fine_tuning(model: RunningModel, settings: FineTuningSettings) -> FineTuning:
    """Return what ``settings`` train on ``model``.

    Raises:
        AdapterError: The network has nothing that fits, or the methods do not combine on it.
    """
    plan = make_plan(model, settings.run_settings())
    layers = describe_layers(model.network)
    parts = stages(plan, layers, settings.schedule, settings.epochs)
    return FineTuning(model, plan, parts, settings)


def fine_tune(
    tuning: FineTuning,
    training: PreparedSlices,
    validation: PreparedSlices | None = None,
    folder: FineTuningFolder | None = None,
    on_epoch: OnEpoch | None = None,
) -> FineTuned:
    """Train all stages; the best state on the validation slices is kept, or else the last one.

    A stage ends after its epochs, or after ``patience`` of them without a better Dice; the
    next one starts from the best state so far. With a folder, a process that was killed and is
    started again goes on after the last whole epoch and ends in the same bits.

    Args:
        tuning: What is trained.
        training: Slices to train on, as ``RunningModel.prepare_all`` gives them.
        validation: Slices of other persons.
        folder: Where to keep each epoch.
        on_epoch: Called after each epoch.

    Raises:
        RunError: The loss is not finite any more, or what is in the folder does not fit.
    """
    unseen = [] if validation is None else [validation.without_weights()]
    slices = concatenate([training, *unseen])
    counts = len(training), len(slices) - len(training)
    progress = _progress(tuning, slices, counts, folder)
    if not progress.lines and tuning.plan.normalisations:
        progress = _with_statistics(tuning, progress, training, validation)
    with tempfile.TemporaryDirectory(prefix="dafne-federated-") as scratch:
        cache = PrefixCache(folder.features if folder else Path(scratch), _FEATURES_MIB)
        for stage in tuning.stages:
            if not _ended(stage, progress.lines, tuning.settings.patience):
                progress = _train_stage(tuning, stage, slices, progress, cache, folder, on_epoch)
    return _chosen(progress, tuning.settings)


def _progress(
    tuning: FineTuning,
    slices: PreparedSlices,
    counts: tuple[int, int],
    folder: FineTuningFolder | None,
) -> Progress:
    """Return where the run stands, which may be its start."""
    digest = arrays_digest(
        {"images": slices.images, "labels": slices.labels, "weights": slices.weights}
    )
    progress = folder.progress() if folder else None
    if progress is None:
        start = tuning.start
        return Progress(digest, counts, None, [], start, start, {})
    if (progress.slices_digest, progress.slices) != (digest, counts):
        msg = "the images or masks are not those that the run began with; choose another --run"
        raise RunError(msg)
    return progress


def _with_statistics(
    tuning: FineTuning,
    progress: Progress,
    training: PreparedSlices,
    validation: PreparedSlices | None,
) -> Progress:
    """Set stored statistics to those of the training slices; the base is measured before."""
    model, before = tuning.model, None
    adapted = AdaptedNetwork(model.network, tuning.plan)
    if validation is not None:
        assert model.loss is not None  # slices were prepared, so the loss was captured
        adapted.write(tuning.start)
        suffix = SuffixTraining(adapted, model.loss, tuning.settings.precision)
        measured, unseen = suffix.on(validation.without_weights())
        before = measured.dice(unseen, tuning.missing)
    start = recalibrate(adapted, model.file.weights, tuning.start, training)
    adapted.write(tuning.start)  # the network holds the base again, for what is attached next
    return replace(progress, base_dice=before, state=start, best=start)


def _own(stage: Stage, lines: Sequence[EpochLine]) -> list[EpochLine]:
    return [line for line in lines if line.stage == stage.name]


def _ended(stage: Stage, lines: Sequence[EpochLine], patience: int) -> bool:
    own = _own(stage, lines)
    later = own and lines[-1].stage != stage.name
    best = max((number for number, line in enumerate(own, start=1) if line.best), default=0)
    return bool(later) or len(own) >= stage.epochs or len(own) - best >= patience


def _train_stage(
    tuning: FineTuning,
    stage: Stage,
    slices: PreparedSlices,
    progress: Progress,
    cache: PrefixCache,
    folder: FineTuningFolder | None,
    on_epoch: OnEpoch | None,
) -> Progress:
    adapted = AdaptedNetwork(tuning.model.network, stage.plan)
    loss = tuning.model.loss
    assert loss is not None  # slices were prepared, so the loss was captured
    loss = marginal_loss(loss, len(tuning.plan.labels) + 1, tuning.missing)
    own = _own(stage, progress.lines)
    if not own:
        progress = replace(progress, state=progress.best)
    adapted.write(part_of(progress.state, stage.plan))  # statistics first: features depend on them
    suffix = SuffixTraining(adapted, loss, tuning.settings.precision)
    # A run that began without room for features goes on without them, in the same bits.
    training, batches = suffix.on(slices, cache if not own or own[-1].features else None)
    features = batches is not slices
    count, others = progress.slices
    to_train, unseen = Part(batches, 0, count), Part(batches, count, others)
    if not own:
        training.restart()
    elif own[-1].features != features:
        msg = "there is no room on the disk for what the frozen layers give; free some"
        raise RunError(msg)
    else:
        training.set_optimiser(progress.optimiser)
    if progress.base_dice is None and others:
        progress = replace(progress, base_dice=training.dice(unseen, tuning.missing))
    settings = tuning.settings
    while not _ended(stage, progress.lines, settings.patience):
        begun = time.monotonic()
        number = len(_own(stage, progress.lines)) + 1
        epoch, rate = len(progress.lines) + 1, settings.learning_rate_in(number, stage.epochs)
        order = (settings.seed, epoch)
        value = training.epoch(to_train, settings.batch_size, rate, order)
        _check(value, epoch)
        dice = training.dice(unseen, tuning.missing) if others else None
        best = dice is None or dice > _best_dice(progress)
        line = EpochLine(
            epoch=epoch,
            stage=stage.name,
            parameters=stage.plan.parameters,
            features=features,
            learning_rate=rate,
            loss=value,
            dice=dice,
            best=best,
            seconds=time.monotonic() - begun,
        )
        progress = _after(progress, line, adapted, training)
        if folder:
            folder.keep(progress)
        if on_epoch:
            on_epoch(line)
    adapted.write(part_of(tuning.start, stage.plan))  # the base's statistics, for the next stage
    return progress


def _check(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        msg = (
            f"epoch {epoch}: the loss is not finite any more; take a smaller --learning-rate "
            f"and another --run folder"
        )
        raise RunError(msg)


def _best_dice(progress: Progress) -> float:
    known = [line.dice for line in progress.lines if line.best and line.dice is not None]
    return max([*known, progress.base_dice or 0.0])


def _after(
    progress: Progress, line: EpochLine, adapted: AdaptedNetwork, training: AdapterTraining
) -> Progress:
    state = progress.state | adapted.read()
    return replace(
        progress,
        lines=[*progress.lines, line],
        state=state,
        best=state if line.best else progress.best,
        optimiser=training.optimiser(),
    )


def _chosen(progress: Progress, settings: FineTuningSettings) -> FineTuned:
    lines, before = progress.lines, progress.base_dice
    kept = max((line.epoch for line in lines if line.best), default=0)
    if before is None:
        reason = f"nobody to validate on: the last epoch, {kept}, is taken unseen"
        return FineTuned(progress.best, kept, None, True, reason, progress)
    if kept:
        dice = _best_dice(progress)
        reason = f"validation Dice rises from {before:.4f} to {dice:.4f} in epoch {kept}"
        return FineTuned(progress.best, kept, dice, True, reason, progress)
    last = lines[-1]
    highest = max(line.dice or 0.0 for line in lines)
    reason = f"no epoch has a validation Dice above that of the base ({highest:.4f}, {before:.4f})"
    if settings.gate == "none":
        reason += ", and the last one is taken because there is no gate"
        return FineTuned(progress.state, last.epoch, last.dice, True, reason, progress)
    return FineTuned(progress.best, 0, before, False, reason, progress)
