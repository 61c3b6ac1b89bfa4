"""The process that fits one group of a benchmark; its memory goes back when it ends.

``python -m dafne_federated.simulations.benchmark_child FOLDER base FOLD`` or ``.. fits ARM
PERSONS FOLD`` or ``.. tests ARM PERSONS FOLD``; started by ``benchmark_run.py``.
"""

import os
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dafne_federated.core.backend import prepare_backend, set_seed
from dafne_federated.core.errors import DafneFederatedError, RunError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.model_file import Weights
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.state import npz_bytes
from dafne_federated.core.versions import versions
from dafne_federated.simulations.benchmark_arms import Arm, WholeSettings
from dafne_federated.simulations.benchmark_cells import (
    Cell,
    Group,
    cell_key,
    chosen_cells,
    first_cells,
)
from dafne_federated.simulations.benchmark_federated import fit_federated
from dafne_federated.simulations.benchmark_fits import (
    POOLED,
    Fitted,
    fit_adapter,
    fit_dafne_merge,
    fit_whole,
    pooled,
    side_by_side,
)
from dafne_federated.simulations.benchmark_folder import PARENT, BenchmarkFolder
from dafne_federated.simulations.benchmark_records import (
    FitLine,
    TestLine,
    append_line,
    read_lines,
)
from dafne_federated.simulations.benchmark_task import Predict, Stopwatch, Task, make_base

_MIB = 2**20
# What ru_maxrss counts in: KiB on Linux, bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def main(folder: Path, what: str, *words: str) -> None:
    """Do one piece of a benchmark."""
    prepare_backend(1, "cpu")
    benchmark = BenchmarkFolder(folder)
    started = benchmark.started()
    if what == "base":
        make_base(benchmark, started, int(words[0]))
        return
    group = Group(words[0], int(words[1]), int(words[2]))
    task = Task(benchmark, started, group.fold)
    if what == "fits":
        _fits(task, group)
    else:
        _tests(task, group)


def _fits(task: Task, group: Group) -> None:
    """Fit all variants with the first seed, choose, and fit the other seeds with the choice."""
    for cell in _chosen(task, group):
        _finished(task, cell)


def _chosen(task: Task, group: Group) -> list[Cell]:
    """Return the fits with the chosen variant, after all variants with the first seed."""
    first = [_finished(task, cell) for cell in first_cells(task.scenario, group)]
    return chosen_cells(task.scenario, group, first)


def _finished(task: Task, cell: Cell) -> FitLine:
    """Return the line of a fit, made now or before."""
    key = cell_key(task.scenario, cell, task.started.data_digest)
    lines = read_lines(task.folder.results, FitLine)
    known = next((line for line in lines if line.cell == key), None)
    if known is not None:
        return known
    watch, arm = Stopwatch.started(), task.scenario.arms[cell.group.arm]
    set_seed(cell.seed, "benchmark", key)
    fitted = _fit(task, arm, cell, key)
    seconds, cpu = watch.seconds, watch.cpu_seconds
    arrays = {f"{s}/{k}": np.asarray(v) for s, w in fitted.weights.items() for k, v in w.items()}
    path = task.folder.fit(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, npz_bytes(arrays))
    line = FitLine(
        cell=key,
        scenario=task.started.name,
        scenario_digest=task.scenario.digest,
        arm=cell.group.arm,
        variant=arm.variants[cell.variant],
        seed=cell.seed,
        persons=cell.group.persons,
        fold=task.fold.name,
        curve=fitted.curve,
        kept=fitted.kept,
        parameters=fitted.parameters,
        slices=fitted.slices,
        seconds=seconds,
        cpu_seconds=cpu,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / _MIB,
        versions=versions(),
        base_digest=task.model.file.digest,
        scores=tuple(task.scores(models(task, arm, fitted.weights), task.division.tuning)),
    )
    append_line(task.folder.results, line)
    return line


def _fit(task: Task, arm: Arm, cell: Cell, key: str) -> Fitted:
    if arm.where == "base":
        return Fitted({POOLED: task.model.file.weights}, (), -1, 0, 0)
    if arm.where == "ensemble":
        return _ensemble(task, arm, cell)
    settings = arm.chosen(arm.variants[cell.variant], cell.seed)
    if isinstance(settings, RunSettings):
        return fit_federated(task, key, cell.group.persons, settings)
    sites = task.site_slices(cell.group.persons)
    held = task.site_validation()
    if arm.where == "dafne-merge":
        assert isinstance(settings, WholeSettings)  # the arm was checked
        return fit_dafne_merge(task, sites, pooled(list(held.values())), settings, cell.seed)
    if arm.where == "local":
        each = {
            name: _one(task, arm, part, held.get(name), settings, cell.seed)
            for name, part in sites.items()
        }
        return side_by_side(each)
    parts = list(sites.values())
    if arm.with_base and (base := task.slices(task.division.base)):
        parts.append(base)
    training = pooled(parts)
    if training is None:
        msg = f"no slice of {len(task.division.sites)} sites can be trained on"
        raise RunError(msg)
    return _one(task, arm, training, pooled(list(held.values())), settings, cell.seed)


def _one(
    task: Task,
    arm: Arm,
    training: PreparedSlices,
    validation: PreparedSlices | None,
    settings: WholeSettings | FineTuningSettings,
    seed: int,
) -> Fitted:
    """Fit one model."""
    if isinstance(settings, FineTuningSettings):
        return fit_adapter(task, training, validation, settings)
    scratch = arm.trains == "scratch"
    start = task.random_weights(seed) if scratch else task.model.file.weights
    return fit_whole(task, start, training, validation, settings, seed, scratch)


def _ensemble(task: Task, arm: Arm, cell: Cell) -> Fitted:
    """Take the models of sites alone together; each of them travels once, to everybody."""
    group = Group(arm.of, cell.group.persons, cell.group.fold)
    variant = _chosen(task, group)[0].variant
    line = _finished(task, Cell(group, variant, cell.seed))
    weights = load_weights(task, line.cell)
    size = sum(value.nbytes for value in next(iter(weights.values())).values()) / 1e6
    last = line.curve[-1].model_copy(update={"megabytes": size * len(weights) ** 2})
    return Fitted(weights, (last,), 0, line.parameters, line.slices)


def load_weights(task: Task, key: str) -> dict[str, Weights]:
    """Return the weights of a finished fit, by site."""
    found: dict[str, Weights] = {}
    with np.load(task.folder.fit(key), allow_pickle=False) as arrays:
        for name in arrays.files:
            site, _, weight = name.rpartition("/")
            found.setdefault(site, {})[weight] = arrays[name]
    return found


def models(task: Task, arm: Arm, weights: dict[str, Weights]) -> dict[str, Predict]:
    """Return what segments persons, by site."""
    if arm.where == "ensemble":
        networks = [task.network(own) for own in weights.values()]
        return {
            POOLED: lambda inputs: np.mean(
                [np.asarray(n.predict_on_batch(inputs.astype(np.float32))) for n in networks],
                axis=0,
            )
        }
    return {site: task.predict_with(own) for site, own in weights.items()}


def _tests(task: Task, group: Group) -> None:
    """Test the fits of the choice on persons that nothing was chosen on."""
    scenario, arm = task.scenario, task.scenario.arms[group.arm]
    cells = _chosen(task, group)
    done = {line.cell for line in read_lines(task.folder.final, TestLine)}
    for cell in cells:
        key = cell_key(scenario, cell, task.started.data_digest)
        if key in done:
            continue
        chosen = models(task, arm, load_weights(task, key))
        division = task.division
        drawn: dict[str, NDArray[np.uint8]] | None = {} if cell == cells[0] else None
        scores = task.scores(chosen, division.test, False, True, drawn)
        scores += task.scores(chosen, division.held_out, True, True, drawn)
        if drawn:
            write_atomic(task.folder.pictures(key), npz_bytes(drawn))
        line = TestLine(
            cell=key,
            scenario=task.started.name,
            arm=group.arm,
            seed=cell.seed,
            persons=group.persons,
            fold=task.fold.name,
            scores=tuple(scores),
        )
        append_line(task.folder.final, line)


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    # Said by the parent itself: it may have ended while this process was still importing.
    started_by = int(os.environ.get(PARENT) or os.getppid())
    threading.Thread(target=_end_with, args=(started_by,), daemon=True).start()
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except DafneFederatedError as error:
        sys.exit(f"dafne-federated: {error}")
