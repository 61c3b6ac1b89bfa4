"""Run a benchmark: pieces in processes of their own, what is finished not twice."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import private_folder, write_atomic
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.simulations.benchmark_cells import (
    Cell,
    Group,
    cell_count,
    cell_key,
    chosen_cells,
    first_cells,
    groups,
    other_cells,
)
from dafne_federated.simulations.benchmark_folder import (
    PARENT,
    BenchmarkFolder,
    Started,
    data_digest,
)
from dafne_federated.simulations.benchmark_images import source_folder, write_images
from dafne_federated.simulations.benchmark_records import FitLine, read_lines
from dafne_federated.simulations.benchmark_scenario import Scenario

_POLL = 0.5  # seconds between two looks at a child
_SHARE = 0.75  # of the memory of the machine, for all children together
_MIB = 2**20

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is started with.

    Attributes:
        folder: Its folder.
        name: Name of the scenario.
        scenario: Its content.
        data: Folder of images, or the one that holds it.
        workers: Processes at the same time, of one thread each.
        memory_gib: The most that all of them may take together.
        only: Arms to run; all if empty.
        command: What a person typed.
        tell: Called with a line after each piece.
    """

    folder: BenchmarkFolder
    name: str
    scenario: Scenario
    data: Path | None = None
    workers: int = 1
    memory_gib: float = 24 * _SHARE
    only: tuple[str, ...] = ()
    command: str = ""
    tell: Tell = field(default=lambda _line: None)


def run_benchmark(benchmark: Benchmark, final: bool = False) -> list[str]:
    """Run what is left of a benchmark, and with ``final`` its test.

    Returns:
        What could not be done, in words; a later start tries it again.

    Raises:
        DafneFederatedError: Something does not fit, before anything is trained; or another
            process runs in this folder.
    """
    with RunFolder(private_folder(benchmark.folder.path)).lock():
        return _run(benchmark, final)


def _run(benchmark: Benchmark, final: bool) -> list[str]:
    folder, scenario = benchmark.folder, benchmark.scenario
    source = source_folder(scenario, benchmark.data)
    started = Started(
        name=benchmark.name,
        scenario=scenario,
        data=source.resolve() if source else None,
        data_digest=data_digest(scenario, source),
        command=benchmark.command,
    )
    chosen = [group for group in groups(scenario) if _wanted(group, benchmark)]
    _refuse_after_test(folder, started, chosen)
    folder.begin(started)
    write_images(scenario, source, folder.images(started))
    _bases(benchmark, started)
    progress = Progress(benchmark, started, chosen)
    failed: list[str] = []
    first = [group for group in chosen if scenario.arms[group.arm].where != "ensemble"]
    rest = [group for group in chosen if group not in first]
    for part in (first, rest):  # an ensemble takes what others trained
        failed += _pieces(benchmark, "fits", progress.unfinished(part), progress)
    if final and not failed:
        _keep_choice(folder, started, chosen)
        failed += _pieces(benchmark, "tests", chosen, None)
    return failed


def chosen_fits(folder: BenchmarkFolder, started: Started) -> list[FitLine]:
    """Return the lines of the fits with the chosen settings, as far as they are finished."""
    known = {line.cell: line for line in read_lines(folder.results, FitLine)}
    found = []
    for group in groups(started.scenario):
        first, _rest = _left(group, started, known)
        if first:
            continue
        cells = _choice(group, started, known)
        keys = [cell_key(started.scenario, cell, started.data_digest) for cell in cells]
        found += [known[key] for key in keys if key in known]
    return found


class Progress:
    """Counts finished fits and says how long the others may take.

    Args:
        benchmark: The benchmark.
        started: What it was started with.
        chosen: The groups to run.
    """

    def __init__(self, benchmark: Benchmark, started: Started, chosen: Sequence[Group]) -> None:
        self._benchmark, self._started = benchmark, started
        self._total = sum(cell_count(benchmark.scenario, group) for group in chosen)
        self._groups = chosen
        self._told: set[str] = set()
        self._size = -1
        self._lock = threading.Lock()
        self.look(quiet=True)

    def unfinished(self, chosen: Sequence[Group]) -> list[Group]:
        """Return the groups that have something left, those that take longest first."""
        known = self._known()
        left = [group for group in chosen if any(_left(group, self._started, known))]
        return sorted(left, key=lambda group: -(group.persons or 10**6))

    def look(self, quiet: bool = False) -> None:
        """Tell of each fit that was finished since the last look."""
        results = self._benchmark.folder.results
        with self._lock:  # children are watched from several threads
            size = results.stat().st_size if results.exists() else 0
            if size != self._size:
                self._size = size
                self._tell(quiet)

    def _tell(self, quiet: bool) -> None:
        known = self._known()
        done = 0
        left: list[float] = []
        by_arm: dict[str, list[float]] = {}
        for line in known.values():
            by_arm.setdefault(line.arm, []).append(line.seconds)
        every = [value for values in by_arm.values() for value in values]
        for group in self._groups:
            first, rest = _left(group, self._started, known)
            open_cells = first + rest
            done += cell_count(self._benchmark.scenario, group) - open_cells
            seconds = by_arm.get(group.arm) or every or [0.0]
            left.append(open_cells * sum(seconds) / len(seconds))
        new = [line for key, line in known.items() if key not in self._told]
        self._told |= known.keys()
        if quiet:
            return
        minutes = sum(left) / max(self._benchmark.workers, 1) / 60
        for line in new:
            best = line.curve[line.kept].dice if line.curve and line.kept >= 0 else None
            dice = "" if best is None else f", validation Dice {best:.3f}"
            where = f" ({line.fold})" if line.fold else ""
            self._benchmark.tell(
                f"{done}/{self._total} {line.arm}{where}, persons {line.persons or 'all'}, "
                f"seed {line.seed}: {line.seconds:.0f} s{dice}; about {minutes:.0f} min left"
            )

    def _known(self) -> dict[str, FitLine]:
        lines = read_lines(self._benchmark.folder.results, FitLine)
        return {line.cell: line for line in lines}


def _wanted(group: Group, benchmark: Benchmark) -> bool:
    return not benchmark.only or group.arm in benchmark.only


def _choice(group: Group, started: Started, known: dict[str, FitLine]) -> list[Cell]:
    """Return the fits of the chosen variant; all variants must be finished."""
    scenario = started.scenario
    first = first_cells(scenario, group)
    lines = [known[cell_key(scenario, cell, started.data_digest)] for cell in first]
    return chosen_cells(scenario, group, lines)


def _left(group: Group, started: Started, known: dict[str, FitLine]) -> tuple[int, int]:
    """Return how many fits of a group are not finished: of the first seed, and of the others."""
    scenario = started.scenario

    def open_of(cells: Sequence[Cell]) -> int:
        keys = [cell_key(scenario, cell, started.data_digest) for cell in cells]
        return sum(key not in known for key in keys)

    first = open_of(first_cells(scenario, group))
    if first:
        return first, len(other_cells(scenario, group, 0))
    return 0, open_of(_choice(group, started, known))


def _refuse_after_test(folder: BenchmarkFolder, started: Started, chosen: Sequence[Group]) -> None:
    """Refuse new fits once the test was touched: it would be chosen on."""
    if not folder.choice.exists():
        return
    tested = folder.tested_cells
    known = {line.cell: line for line in read_lines(folder.results, FitLine)}
    for group in chosen:
        if any(_left(group, started, known)):
            msg = (
                f"{folder.path}: the test was made already, and arm {group.arm!r} has fits that "
                "were not part of it; choose another --run"
            )
            raise RunError(msg)
        for cell in _choice(group, started, known):
            if cell_key(started.scenario, cell, started.data_digest) not in tested:
                msg = f"{folder.path}: the test was made with other arms; choose another --run"
                raise RunError(msg)


def _keep_choice(folder: BenchmarkFolder, started: Started, chosen: Sequence[Group]) -> None:
    if folder.choice.exists():
        return
    known = {line.cell: line for line in read_lines(folder.results, FitLine)}
    cells = [cell for group in chosen for cell in _choice(group, started, known)]
    keys = [cell_key(started.scenario, cell, started.data_digest) for cell in cells]
    content = {"scenario": started.scenario.digest, "cells": keys}
    write_atomic(folder.choice, json.dumps(content, indent=1).encode())


def _bases(benchmark: Benchmark, started: Started) -> None:
    """Train the bases that are missing, one after the other."""
    for number, fold in enumerate(started.scenario.persons.folds):
        if not (benchmark.folder.base(started, fold) / "task.model").exists():
            begun = time.monotonic()
            failure = _child(benchmark, f"base-{number}", ["base", str(number)], None)
            if failure:
                raise RunError(failure)
            name = f" of fold {fold.name}" if fold.name else ""
            benchmark.tell(f"base{name}: {time.monotonic() - begun:.0f} s")


def _pieces(
    benchmark: Benchmark, what: str, chosen: Sequence[Group], progress: Progress | None
) -> list[str]:
    """Run the pieces, so many at the same time, and return what failed."""

    def run(group: Group) -> str:
        words = [what, group.arm, str(group.persons), str(group.fold)]
        return _child(benchmark, "-".join(words), words, progress)

    with ThreadPoolExecutor(benchmark.workers) as pool:
        return [failure for failure in pool.map(run, chosen) if failure]


def _child(benchmark: Benchmark, name: str, words: Sequence[str], progress: Progress | None) -> str:
    """Run one process to its end; return what went wrong, or nothing."""
    folder = benchmark.folder.path
    log = folder / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    module = "dafne_federated.simulations.benchmark_child"
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    environment[PARENT] = str(os.getpid())
    most = benchmark.memory_gib * 1024 / benchmark.workers
    with log.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), *words],
            stdout=file,
            stderr=file,
            env=environment,
        )
    try:
        while child.poll() is None:
            time.sleep(_POLL)
            if progress:
                progress.look()
            if _resident_mib(child.pid) > most:
                child.kill()
                child.wait()
                return f"{name}: took more than {most:.0f} MiB of memory and was ended"
    finally:
        child.kill()
        child.wait()
    if progress:
        progress.look()
    if child.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"{name}: {last[0] if last else f'ended with status {child.returncode}'}"
    return ""


def _resident_mib(number: int) -> float:
    """Return the memory of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB
