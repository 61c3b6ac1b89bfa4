"""Dafne's own preprocessing, run with fast parts that give the same bits.

A Dafne model prepares its slices inside its own functions, with constants that stand in
their source. Those functions run as they are; only the slow library functions that they
call are replaced, for as long as they run.
"""

import importlib.util
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import skimage.morphology as morphology

from dafne_federated.core import area_filter, boundary_weight, mask_planes
from dafne_federated.core.bias_field import BiasFieldCache, CachedFilter
from dafne_federated.core.errors import DataError, RunError, SettingsError

__all__ = ["BiasFieldCache", "fast_preprocessing"]

ProcessFunction = Callable[..., tuple[list[Any], list[Any]]]

_SLICE_LOOPS = (
    "common_input_process",
    "common_input_process_single",
    "common_input_process_split",
)
_THREADS_PER_WORKER = 4
_turn = threading.Lock()
_holder: list[int] = []  # the thread whose turn it is


@contextmanager
def fast_preprocessing(
    cache: BiasFieldCache | None = None, workers: int | None = None
) -> Iterator[None]:
    """Make a Dafne model's own functions prepare slices faster, with the same bits.

    Inside the block SimpleITK uses one thread, because its N4 correction differs between
    numbers of threads, and whatever is printed, here and in other threads, is dropped.
    Everything is put back at the end, after an exception, too. The replacements are seen by
    the whole process: a second thread waits until the first has left its block.

    Args:
        cache: where N4 corrections are looked up and kept; None computes each of them.
        workers: how many processor cores prepare the slices of a training set; None for all.
            The bits do not depend on it.

    Raises:
        RunError: SimpleITK is missing, or this thread is in such a block already.
        SettingsError: ``workers`` is not positive.
        DataError: from Dafne's functions inside the block, for a slice without signal.
    """
    if workers is None:
        workers = _cores()
    if workers < 1:
        msg = f"the number of workers must be at least 1, got {workers}"
        raise SettingsError(msg)
    if threading.get_ident() in _holder:
        msg = (
            "fast preprocessing is already on in this thread; leave the first block before the next"
        )
        raise RunError(msg)
    simpleitk, dafne = _load()
    with _turn, ExitStack() as stack:
        _holder.append(threading.get_ident())
        stack.callback(_holder.clear)
        threads = simpleitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        stack.callback(simpleitk.ProcessObject.SetGlobalDefaultNumberOfThreads, threads)
        simpleitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        for module, name, replacement in _replacements(simpleitk, dafne, cache, workers):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, replacement)
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nowhere))
        yield


def _cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> tuple[Any, Any]:
    """Return SimpleITK and Dafne's preprocessing, without starting an installation.

    Raises:
        RunError: SimpleITK is missing; importing Dafne's library would try to install it.
    """
    if importlib.util.find_spec("SimpleITK") is None:
        msg = (
            "SimpleITK is not installed, and Dafne's library would try to install it by itself; "
            "install it with: pip install SimpleITK-SimpleElastix"
        )
        raise RunError(msg)
    import SimpleITK as simpleitk  # noqa: N813, Dafne's library must not be imported without it

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from dafne_dl.common import preprocess_train

    return simpleitk, preprocess_train


def _replacements(
    simpleitk: Any, dafne: Any, cache: BiasFieldCache | None, workers: int
) -> list[tuple[ModuleType, str, Any]]:
    """Return module, name and stand-in of each function that is replaced."""
    remove_overlap = dafne.calc_aggregated_masks_and_remove_overlap
    correction = dafne.biascorrection
    table = [
        (morphology, "area_opening", area_filter.area_opening),
        (morphology, "area_closing", area_filter.area_closing),
        (dafne, "zoom", mask_planes.zoom),
        (dafne, "calc_weight", boundary_weight.weight_map),
        (correction, "biascorrection_image", _with_signal(correction.biascorrection_image)),
        (
            dafne,
            "calc_aggregated_masks_and_remove_overlap",
            mask_planes.overlap_remover(remove_overlap),
        ),
    ]
    if cache is not None:
        real = simpleitk.N4BiasFieldCorrectionImageFilter
        table.append(
            (
                simpleitk,
                "N4BiasFieldCorrectionImageFilter",
                lambda: CachedFilter(real(), simpleitk, cache),
            )
        )
    if workers > 1:
        table += [
            (dafne, name, _slice_by_slice(getattr(dafne, name), workers)) for name in _SLICE_LOOPS
        ]
    return table


def _with_signal(correct: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``correct`` with a plain word for slices that cannot be scaled by their maximum."""

    @wraps(correct)
    def run(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, np.ndarray) and (not np.isfinite(image).all() or image.max() == 0):
            msg = (
                "a slice has no signal that can be corrected for the bias field: its highest grey "
                "value is 0 or some are not finite; leave such slices out"
            )
            raise DataError(msg)
        return correct(image, *args, **kwargs)

    return run


def _slice_by_slice(process: ProcessFunction, workers: int) -> ProcessFunction:
    """Return a function that hands Dafne's loop over slices one slice at a time, in parallel.

    The loop treats each slice by itself and keeps their order, and the N4 correction leaves
    Python free to run: as many slices are worked on as there are workers.
    """
    signature = inspect.signature(process)

    def one(arguments: dict[str, Any], index: int) -> tuple[list[Any], list[Any]]:
        data = arguments["trainingData"]
        return process(
            **arguments
            | {
                "trainingData": {**data, "image_list": [data["image_list"][index]]},
                "trainingOutputs": [arguments["trainingOutputs"][index]],
            }
        )

    @wraps(process)
    def run(*args: Any, **kwargs: Any) -> tuple[list[Any], list[Any]]:
        bound = signature.bind(*args, **kwargs)
        count = len(bound.arguments["trainingData"]["image_list"])
        if count < 2:
            return process(*args, **kwargs)
        # More threads than cores share the last slices between all cores; which slice is when
        # does not matter to its bits.
        with ThreadPoolExecutor(min(_THREADS_PER_WORKER * workers, count)) as pool:
            parts = list(pool.map(partial(one, bound.arguments), range(count)))
        return [image for images, _ in parts for image in images], [
            mask for _, masks in parts for mask in masks
        ]

    return run
