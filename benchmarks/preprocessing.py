"""Preprocessing of one 250x250 slice with 12 labels: Dafne's own code against the fast parts.

Run: python benchmarks/preprocessing.py [--levels 8 4] [--repeats 3] [--seed 1]

Both sides run in turn in the same process, with SimpleITK at one thread, and must give the
same bits; a difference ends the run with an error. First touch: nothing is cached. Warm: the
bias field is in the cache. Kept: the prepared slice is in a site's cache, as in every later
epoch, round or run; the time is that of hashing image and masks and of reading the file. The
set: several slices at once, as a site prepares them, on all cores. Processor time is the same
for a busy and an idle machine; only the set, whose point is the waiting, is measured in wall
time.
"""

import argparse
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import SimpleITK as sitk  # noqa: N813
import skimage.morphology
from dafne_dl.common import preprocess_train as dafne
from scipy import ndimage

from dafne_federated.client.site_cache import SiteCache
from dafne_federated.core import area_filter, boundary_weight, mask_planes
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.function_sources import NetworkSpec
from dafne_federated.core.model_runtime import RunningModel, build_model
from dafne_federated.core.preprocessing import BiasFieldCache, fast_preprocessing
from dafne_federated.core.volumes import Case

SIDE = 250
LABELS = 12
BAND = 49
RESOLUTION = 1.037037  # mm, that of Dafne's thigh model
INVERSE = {f"muscle {index}": index + 1 for index in range(LABELS)}
PACKAGES = ("dafne-dl", "numpy", "scipy", "scikit-image", "SimpleITK-SimpleElastix")


def draw_slice(rng):
    """Draw a thigh: fat, twelve muscles around a bone, a receive-coil shading and noise."""
    rows, columns = np.indices((SIDE, SIDE)).astype(float)
    row, column = SIDE / 2 + rng.normal(0, 3, 2)
    radius = np.hypot((rows - row) / 1.0, (columns - column) / 1.12)
    angle = np.arctan2(rows - row, columns - column) + rng.uniform(0, 2 * np.pi)
    wobble = 1 + 0.05 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.03 * np.sin(7 * angle)
    skin, fascia, bone = 100 * wobble, 82 * wobble, 14
    sector = np.floor((angle % (2 * np.pi)) / (2 * np.pi) * LABELS).astype(int) % LABELS
    muscle = (radius < fascia * (0.97 - 0.02 * (sector % 3))) & (radius > bone + 3)
    gap = np.abs((angle * LABELS / (2 * np.pi)) % 1 - 0.5) > 0.47
    values = np.where(radius < skin, 900.0, 0.0)
    values[radius < fascia] = 350
    values[muscle] = 280 + 8.0 * sector[muscle]
    values[muscle & gap] = 450
    values[radius < bone] = 700
    values[(radius < bone + 3) & (radius >= bone)] = 40
    shading = np.exp(-((rows - 0.2 * SIDE) ** 2 + (columns - 0.7 * SIDE) ** 2) / (1.1 * SIDE) ** 2)
    values = ndimage.gaussian_filter(values, 0.8) * (0.6 + 0.7 * shading)
    image = np.hypot(values + rng.normal(0, 14, values.shape), rng.normal(0, 14, values.shape))
    specks = rng.random((SIDE, SIDE)) < 0.001
    masks = {
        name: ((muscle & ~gap & (sector == index)) ^ specks).astype(np.uint8)
        for index, name in enumerate(INVERSE)
    }
    return image.astype(np.float32), masks


def draw_case(labels, count, seed):
    """Draw a case of ``count`` slices with a muscle for each of the 12 labels."""
    rng = np.random.default_rng(seed)
    slices = [draw_slice(rng) for _ in range(count)]
    return Case(
        name="drawn",
        person="drawn",
        site="",
        image=np.stack([image for image, _ in slices], axis=-1),
        masks={
            label: np.stack([masks[name] > 0 for _, masks in slices], axis=-1)
            for label, name in zip(labels, INVERSE, strict=True)
        },
        spacing=(1.0, 1.0, 5.0),
        affine=None,
    )


def prepare(slices, levels):
    size = [SIDE, SIDE]
    data = {"image_list": [image for image, _ in slices], "resolution": np.array([1.0, 1.0])}
    prepared = dafne.common_input_process_single(
        INVERSE,
        np.array([RESOLUTION, RESOLUTION]),
        size,
        size,
        data,
        [masks for _, masks in slices],
        False,
        levels,
        -1,
    )
    return dafne.input_creation_mem(*prepared, BAND)


def bits(result):
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [(part.dtype, part.shape, part.tobytes()) for part in parts]


def compare(name, theirs, ours, repeats, clock=time.process_time):
    """Run both sides in turn and print a table row."""
    times = ([], [])
    results = [None, None]
    for _ in range(repeats):
        for side, run in enumerate((theirs, ours)):
            start = clock()
            results[side] = run()
            times[side].append(1e3 * (clock() - start))
        if bits(results[0]) != bits(results[1]):
            sys.exit(f"different bits: {name}")
    cells = [f"{statistics.median(t):.1f} ({min(t):.1f} to {max(t):.1f})" for t in times]
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    print(f"| {name:46} | {cells[0]:>30} | {cells[1]:>30} | {ratio:6.4f} |", flush=True)


def quietly(function, cache=None, workers=1):
    def run():
        with fast_preprocessing(cache() if callable(cache) else cache, workers):
            return function()

    return run


def upstream(function):
    """Return Dafne's code as it is, with its messages sent nowhere."""

    def run():
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            return function()

    return run


def filtered(opening, closing, masks):
    return [closing(opening(mask, area_threshold=4), area_threshold=4) for mask in masks]


def bias_field(image, levels):
    scaled = sitk.Cast(sitk.GetImageFromArray(image * 600 / image.max()), sitk.sitkFloat32)
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations([50] * levels)
    return sitk.GetArrayFromImage(corrector.Execute(scaled, sitk.OtsuThreshold(scaled, 0, 1, 200)))


def parts(image, masks, repeats):
    """Print one row for each function that is replaced."""
    skimage_pair = (skimage.morphology.area_opening, skimage.morphology.area_closing)
    our_pair = (area_filter.area_opening, area_filter.area_closing)
    planes = list(masks.values())
    labels = sum(index * mask.astype(float) for index, mask in enumerate(np.minimum(planes, 1), 1))
    labels = np.minimum(labels, LABELS)
    stack = np.stack([np.zeros((SIDE, SIDE)), *planes], axis=-1).astype(float)
    frequencies = [max((labels == k).mean(), 1e-4) for k in range(LABELS + 1)]
    weigh = (image, labels, np.mean(frequencies), frequencies, SIDE, BAND, LABELS + 1)
    factor = np.array([1.0, 1.0]) / RESOLUTION
    remove = dafne.calc_aggregated_masks_and_remove_overlap
    fast_remove = mask_planes.overlap_remover(remove)
    rows = [
        (
            "area opening and closing, 12 masks",
            lambda: filtered(*skimage_pair, planes),
            lambda: filtered(*our_pair, planes),
        ),
        (
            "area opening and closing, image",
            lambda: filtered(*skimage_pair, [image]),
            lambda: filtered(*our_pair, [image]),
        ),
        (
            "zoom, 12 masks",
            lambda: [ndimage.zoom(mask, factor, order=0) for mask in planes],
            lambda: [mask_planes.zoom(mask, factor, order=0) for mask in planes],
        ),
        ("overlap removal", lambda: remove(stack.copy()), lambda: fast_remove(stack.copy())),
        (
            "weight map",
            lambda: dafne.calc_weight(*weigh),
            lambda: boundary_weight.weight_map(*weigh),
        ),
    ]
    for name, theirs, ours in rows:
        compare(name, theirs, ours, repeats)


def whole(slices, levels, repeats, workers):
    """Print the rows of whole slices at one number of N4 levels."""
    first = slices[:1]
    one, many = (lambda: prepare(first, levels)), (lambda: prepare(slices, levels))
    image = first[0][0]
    compare(
        f"N4, {levels} levels, first touch",
        lambda: bias_field(image, levels),
        quietly(lambda: bias_field(image, levels), BiasFieldCache),
        repeats,
    )
    compare(
        f"whole slice, {levels} levels, first touch",
        upstream(one),
        quietly(one, BiasFieldCache),
        repeats,
    )
    compare(
        f"{len(slices)} slices, {levels} levels, first touch, wall time",
        upstream(many),
        quietly(many, BiasFieldCache, workers),
        repeats,
        time.perf_counter,
    )
    with tempfile.TemporaryDirectory() as folder:
        memory, disk = BiasFieldCache(), Path(folder)
        quietly(one, memory)()
        quietly(one, BiasFieldCache(disk))()
        compare(
            f"whole slice, {levels} levels, warm in memory",
            upstream(one),
            quietly(one, memory),
            repeats,
        )
        compare(
            f"whole slice, {levels} levels, warm on disk",
            upstream(one),
            quietly(one, lambda: BiasFieldCache(disk)),
            repeats,
        )


def kept(levels, seed, repeats):
    """Print the row of a case that a site has prepared before and finds in its cache."""
    spec = NetworkSpec(
        labels=tuple(INVERSE),
        size=SIDE,
        resolution=(RESOLUTION, RESOLUTION),
        filters=(2, 2),
        strides=(2,),
        bias_levels=levels,
    )
    file = build_model("benchmark", spec.sources(), 1, {})
    case = draw_case(list(INVERSE), 1, seed)
    with tempfile.TemporaryDirectory() as folder:
        approvals = Approvals(Path(folder) / "approved.json")
        approvals.add(file, "made by a benchmark")
        model = RunningModel(file, approvals)
        cache = SiteCache(Path(folder))
        masks = [{name: mask[..., 0].astype(np.uint8) for name, mask in case.masks.items()}]
        data = {"image_list": [case.image[..., 0]], "resolution": np.array([1.0, 1.0])}

        def dafnes():
            prepared = dafne.common_input_process_single(
                INVERSE, np.array(spec.resolution), [SIDE, SIDE], [SIDE, SIDE], dict(data),
                [dict(one) for one in masks], False, levels, -1,
            )  # fmt: skip
            (found,) = dafne.input_creation_mem(*prepared, BAND)
            return [found[..., 0].astype(np.float32), found[..., -1].astype(np.float32)]

        def found():
            slices = cache.slices(cache.slices_key(case, file, ""))
            return [slices.images[0], slices.weights[0]]

        cache.keep_slices(cache.slices_key(case, file, ""), model.prepare(case))
        compare(f"whole slice, {levels} levels, kept at a site", upstream(dafnes), found, repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--levels", type=int, nargs="+", default=[8, 4], help="8: thigh, 4: trainer"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    rng = np.random.default_rng(options.seed)
    slices = [draw_slice(rng) for _ in range(options.slices)]
    print(f"command: python benchmarks/preprocessing.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    print(f"seed {options.seed}, {options.repeats} repeats, {options.workers} workers")
    print("ms of processor time, of wall time where it says so: median (range)")
    print(f"| {'step':46} | {'Dafne':30} | {'here':30} | {'ratio':6} |")
    print("|---|---|---|---|")
    parts(*slices[0], options.repeats)
    for levels in options.levels:
        whole(slices, levels, options.repeats, options.workers)
        kept(levels, options.seed, options.repeats)
    print("Both sides gave the same bits in every row.")


if __name__ == "__main__":
    main()
