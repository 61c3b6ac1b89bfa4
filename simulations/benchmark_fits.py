"""Fits of the arms that are no federation: all images in one place, each site alone, Dafne."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import RunError
from dafne_federated.core.fine_tuning import fine_tune, plan_fine_tuning
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.model_file import Weights, read_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.state import fold
from dafne_federated.core.training import train_network
from dafne_federated.simulations.benchmark_arms import WholeSettings
from dafne_federated.simulations.benchmark_records import Point
from dafne_federated.simulations.benchmark_task import Task

Array = npt.NDArray[np.generic]
POOLED = ""  # the key of a model that is for everybody


@dataclass(frozen=True)
class Fitted:
    """What a fit gave.

    Attributes:
        weights: Of the whole network, by site; one under ``POOLED`` where it is for everybody.
        curve: Each epoch, round or contribution.
        kept: Which point of the curve was kept, 0 first; -1 for the start.
        parameters: Values that were trained.
        slices: Training slices, all sites together.
    """

    weights: dict[str, Weights]
    curve: tuple[Point, ...]
    kept: int
    parameters: int
    slices: int


def fit_whole(
    task: Task,
    start: Weights,
    training: PreparedSlices,
    validation: PreparedSlices | None,
    settings: WholeSettings,
    seed: int,
    scratch: bool,
) -> Fitted:
    """Train all weights from ``start``; the epoch with the best validation Dice is kept.

    What starts from the base stays the base if no epoch is better, as with every other arm.
    """
    task.write(start)
    before = None if scratch else task.validation_dice(validation)
    times: list[float] = [time.process_time()]
    fit = train_network(
        task.model.network,
        task.loss,
        training,
        validation,
        settings.epochs,
        settings.patience,
        settings.batch_size,
        settings.learning_rate,
        seed,
        lambda *_figures: times.append(time.process_time()),
    )
    curve = tuple(
        Point(epoch=number, seconds=at - times[0], longest=at - times[0], megabytes=0, dice=dice)
        for number, (at, (_, dice)) in enumerate(zip(times[1:], fit.history, strict=True), start=1)
    )
    better = before is None or fit.best_dice is None or fit.best_dice > before
    weights, kept = (_weights(task), fit.best_epoch - 1) if better else (start, -1)
    parameters = sum(math.prod(v.shape) for v in task.model.network.trainable_variables)
    return Fitted({POOLED: weights}, curve, kept, parameters, len(training))


def fit_adapter(
    task: Task,
    training: PreparedSlices,
    validation: PreparedSlices | None,
    settings: FineTuningSettings,
) -> Fitted:
    """Train a method of the table on the base; the best state on validation is kept."""
    # An adapted network stays adapted, so each fit takes one of its own.
    model = RunningModel(read_model(task.base_path), task.approvals)
    model.loss = task.loss
    tuning = plan_fine_tuning(model, settings)
    tuned = fine_tune(tuning, training, validation)
    curve, seconds = [], 0.0
    for line in tuned.progress.lines:
        seconds += line.seconds
        curve.append(
            Point(epoch=line.epoch, seconds=seconds, longest=seconds, megabytes=0, dice=line.dice)
        )
    weights = fold(model.file.weights, tuning.plan, tuned.state)
    parameters = tuning.plan.parameters
    return Fitted({POOLED: weights}, tuple(curve), tuned.epoch - 1, parameters, len(training))


def side_by_side(parts: Mapping[str, Fitted]) -> Fitted:
    """Return the fits of sites alone as one: seconds add up, and all have the same epochs.

    The Dice of an epoch is the mean over sites; one that has stopped stays where it was kept.
    """
    longest = max(len(part.curve) for part in parts.values())
    curve = []
    for number in range(longest):
        points = [part.curve[min(number, len(part.curve) - 1)] for part in parts.values()]
        now = [
            point if number < len(part.curve) else part.curve[max(part.kept, 0)]
            for part, point in zip(parts.values(), points, strict=True)
        ]
        known = [point.dice for point in now if point.dice is not None]
        curve.append(
            Point(
                epoch=number + 1,
                seconds=math.fsum(point.seconds for point in points),
                longest=max(point.longest for point in points),
                megabytes=0,
                dice=math.fsum(known) / len(known) if known else None,
            )
        )
    return Fitted(
        {name: part.weights[POOLED] for name, part in parts.items()},
        tuple(curve),
        max(part.kept for part in parts.values()),
        max(part.parameters for part in parts.values()),
        sum(part.slices for part in parts.values()),
    )


def fit_dafne_merge(
    task: Task,
    sites: Mapping[str, PreparedSlices],
    validation: PreparedSlices | None,
    settings: WholeSettings,
    seed: int,
) -> Fitted:
    """Let sites train the whole newest model one after the other, averaging half and half.

    The average takes all arrays, batch statistics among them. A merged model becomes the newest
    one by its Dice on validation persons, who stand for the test set of a Dafne server.

    Source:
        ``merge`` of Dafne's server: 0.5 * newest + 0.5 * contribution.
    """
    current = dict(task.model.file.weights)
    task.write(current)
    best = task.validation_dice(validation)
    if best is None and settings.accept != "all":
        msg = f"dafne-merge: accept {settings.accept!r} needs validation persons"
        raise RunError(msg)
    size = sum(np.asarray(value).nbytes for value in current.values()) / 1e6
    names, curve, seconds, kept, slices = sorted(sites), [], 0.0, -1, 0
    for number in range(settings.contributions):
        site = names[number % len(names)]
        local = fit_whole(task, current, sites[site], None, settings, seed * 1000 + number, False)
        sent = local.weights[POOLED]
        merged = {key: _half(current[key], sent[key]) for key in current}
        task.write(merged)
        dice = task.validation_dice(validation)
        seconds += local.curve[-1].seconds
        curve.append(
            Point(
                epoch=settings.epochs * (number + 1),
                seconds=seconds,
                longest=seconds,  # one after the other
                megabytes=2 * size * (number + 1),
                dice=dice,
            )
        )
        slices = sum(len(part) for part in sites.values())
        least = {"all": -1.0, "threshold": settings.threshold, "not-worse": best}[settings.accept]
        if dice is None or least is None or dice >= least:
            current, kept, best = merged, number, dice
    parameters = sum(math.prod(v.shape) for v in task.model.network.trainable_variables)
    return Fitted({POOLED: current}, tuple(curve), kept, parameters, slices)


def pooled(parts: Sequence[PreparedSlices]) -> PreparedSlices | None:
    """Return the slices of several sites as one set; None if there are none."""
    return concatenate(parts) if parts else None


def _half(one: Array, other: Array) -> Array:
    return (0.5 * one.astype(np.float64) + 0.5 * other.astype(np.float64)).astype(one.dtype)


def _weights(task: Task) -> Weights:
    return {f"{i:04d}": np.array(v) for i, v in enumerate(task.model.network.get_weights())}
