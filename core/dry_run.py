"""Measure what a plan costs on this machine: a few steps in a process of their own.

Each plan is measured in a fresh process, because the memory that one has taken is never seen
to shrink again. Time and memory depend on shapes, not on values: the input is random. Outputs
of frozen layers are kept on disk, as in training; the step that fills the cache is not counted.
"""

import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DataError, RunError
from dafne_federated.core.findings import ModelExpectation, expectation_of
from dafne_federated.core.model_file import read_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.volumes import Case

_STEPS = 2
FEATURES_MIB = 8192  # as a site allows by default; a step's slices need far less


@dataclass(frozen=True)
class Bench:
    """What all dry runs of a model share.

    Attributes:
        model: The model, approved on this machine.
        case: One case that its training function accepts; it tells the loss.
        classification: The class of the case as Dafne names it.
        batch_size: Slices in a step.
        threads: CPU threads, 0 for all cores.
        device: ``auto``, ``cpu`` or ``gpu``.
        approvals: The list of models that may run on this machine.
        scratch: A folder for what the processes share.
    """

    model: Path
    case: Case
    classification: str
    batch_size: int
    threads: int
    device: str
    approvals: Path
    scratch: Path


@dataclass(frozen=True)
class DryRun:
    """What a plan costs.

    Attributes:
        step_seconds: One step of training: the faster of two, after one that is not counted.
        peak_mib: The most memory that the process had, in MiB; that of a graphics card is not
            in it. None on systems that do not tell.
        start_mib: The most memory that it had before the plan was attached: the model and the
            libraries.
        kept_slices: Slices of the case that the training function keeps.
        device: Where it ran.
    """

    step_seconds: float
    peak_mib: float | None
    start_mib: float | None
    kept_slices: int
    device: str


@contextmanager
def bench_of(
    model: Path, case: Case | None, classification: str, batch_size: int, threads: int, device: str
) -> Iterator[Bench]:
    """Give what the dry runs of a model need; without a case, one is drawn.

    Args:
        model: The model, approved on this machine.
        case: A case, or None.
        classification: Its class as Dafne names it.
        batch_size: Slices in a step.
        threads: CPU threads, 0 for all cores.
        device: ``auto``, ``cpu`` or ``gpu``.
    """
    with tempfile.TemporaryDirectory(prefix="dafne-federated-") as folder:
        yield Bench(
            model=model,
            case=case or drawn_case(expectation_of(read_model(model))),
            classification=classification,
            batch_size=batch_size,
            threads=threads,
            device=device,
            approvals=Approvals().path,
            scratch=Path(folder),
        )


def dry_run(bench: Bench, plan: AdaptationPlan) -> DryRun:
    """Return what a few training steps of ``plan`` cost, measured in a process of its own.

    Raises:
        RunError: The process ended, most likely because memory did not suffice.
        DataError: The model's training function keeps no slice of the case.
    """
    with ProcessPoolExecutor(1, mp_context=process_start()) as pool:
        try:
            return pool.submit(_measure, bench, plan).result()
        except BrokenProcessPool:
            msg = "the process ended by itself, most likely because memory did not suffice"
            raise RunError(msg) from None


def drawn_case(expected: ModelExpectation) -> Case:
    """Return one slice of noise with a square for each label, of the size a model expects."""
    rows, columns = expected.size or (128, 128)
    spacing = expected.spacing or (1.0, 1.0)
    generator = np.random.default_rng(0)
    image = generator.normal(100, 10, (rows, columns, 1)).astype(np.float32)
    side = math.ceil(math.sqrt(len(expected.labels)))
    height, width = rows // (side + 2), columns // (side + 2)
    masks = {}
    for index, label in enumerate(expected.labels):
        row, column = (1 + index // side) * height, (1 + index % side) * width
        mask = np.zeros(image.shape, np.bool_)
        mask[row : row + max(height - 1, 1), column : column + max(width - 1, 1)] = True
        image[mask] += 5 * (index + 1)
        masks[label] = mask
    return Case(
        name="drawn",
        person="drawn",
        site="",
        image=np.maximum(image, 1),
        masks=masks,
        spacing=(*spacing, 1.0),
        affine=None,
    )


def physical_memory_mib() -> float | None:
    """Return the memory of this machine in MiB; None on systems that do not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    except (AttributeError, ValueError, OSError):
        return None


def process_start() -> BaseContext:
    """Return a way to start processes that do not inherit the memory mark of this one.

    A process that is started directly takes over the high-water mark of the one that starts
    it, on Linux even when it runs another program. A fork server is small.
    """
    known = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")


def _measure(bench: Bench, plan: AdaptationPlan) -> DryRun:
    from dafne_federated.core.backend import prepare_backend, set_seed

    device = prepare_backend(bench.threads, bench.device)
    from dafne_federated.core.adapters import AdaptedNetwork
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.prefix_cache import PrefixCache
    from dafne_federated.core.preprocessing import BiasFieldCache
    from dafne_federated.core.state import initial_state
    from dafne_federated.core.suffix_training import SuffixTraining

    set_seed("dry run")
    model = RunningModel(read_model(bench.model), Approvals(bench.approvals))
    cache = BiasFieldCache(bench.scratch / "bias-fields")
    kept = model.prepare(bench.case, bench.classification, cache)
    if kept is None or model.loss is None:
        msg = (
            f"the model's training function keeps no slice of case {bench.case.name!r}; give "
            f"--data with a folder of cases that it can be trained on"
        )
        raise DataError(msg)
    start = _peak_mib()
    adapted = AdaptedNetwork(model.network, plan)
    adapted.write(initial_state(plan, 0))
    training = SuffixTraining(adapted, model.loss)
    slices = _noise(kept, bench.batch_size)
    features = PrefixCache(bench.scratch / "features", FEATURES_MIB)
    try:
        _, *steps = (
            training.run(slices, 1, len(slices), learning_rate=1e-3, seed=0, cache=features).seconds
            for _ in range(1 + _STEPS)
        )
    except Exception as error:
        if not _out_of_memory(error):
            raise
        msg = f"the memory of {device.name} does not suffice for a step of {len(slices)} slices"
        raise RunError(msg) from None
    return DryRun(min(steps), _peak_mib(), start, len(kept), device.name)


def _out_of_memory(error: Exception) -> bool:
    """Return whether a backend says that a device has no memory left; each has its own error."""
    words = f"{type(error).__name__} {error}".lower().replace("_", "").replace(" ", "")
    return any(word in words for word in ("resourceexhausted", "outofmemory"))


def _noise(like: PreparedSlices, count: int) -> PreparedSlices:
    generator = np.random.default_rng(0)
    shape = (count, *like.images.shape[1:])
    return PreparedSlices(
        images=generator.uniform(0, 1, shape).astype(np.float32),
        labels=generator.integers(0, like.channels, shape, np.uint8),
        weights=np.ones(shape, np.float32),
        channels=like.channels,
    )


def _peak_mib() -> float | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
