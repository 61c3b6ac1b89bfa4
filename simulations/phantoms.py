"""Phantom limbs: cross-sections of a thigh drawn from formulas, for populations that differ.

A limb is skin, a ring of fat, four muscles with fat between them and a bone, varying smoothly
along its axis. It looks enough like MRI to be segmented by the same networks and hard enough
that a model trained on one population loses accuracy on others. It says nothing about patients.
"""

import csv
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from dafne_federated.core.dataset import DATASET, PARTICIPANTS, DataFolder, open_folder
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.volumes import Case, write_nifti_pair

Range = tuple[float, float]
Array = NDArray[np.float64]

MUSCLES: Final = ("vastus", "rectus", "hamstring", "adductor")
LABELS: Final[Mapping[int, str]] = dict(enumerate(MUSCLES, start=1))

PIXELS: Final = 96
PIXEL_MM: Final = 2.0
SLICES: Final = 6
SLICE_MM: Final = 8.0
_FINER = 2  # each pixel is drawn as 2 x 2 points, whose mean is the partial volume
_AIR, _FAT, _CORTEX, _MARROW, _VESSEL, _FIRST_MUSCLE = range(6)
_TISSUES = _FIRST_MUSCLE + len(MUSCLES)

# Muscles of an average limb, in units of the muscle sleeve's radius, 0 degrees to the right and
# 90 to the front: centre (2) of an arc, its radius, start and end angle, half the thickness of
# the muscle around it, and how much thicker it is towards the head, as a share.
_CORES: Final = np.array(
    [
        [0.00, 0.00, 0.40, -50, 190, 0.23, -0.10],  # vastus, around the bone
        [0.00, 0.00, 0.76, 72, 112, 0.19, 0.20],  # rectus, in front of it
        [0.00, 0.00, 0.62, 238, 318, 0.33, -0.10],  # hamstring, at the back
        [0.00, 0.00, 0.58, 172, 214, 0.31, 0.25],  # adductor, on the inner side
    ]
)


@dataclass(frozen=True)
class Population:
    """How the limbs of one site look: each person draws from every range, evenly.

    Attributes:
        name: Name of the site.
        radius: Half the width of the limb, in mm.
        fat_ring: Thickness of the fat under the skin, as a share of the radius.
        muscle_bulk: Thickness of the muscles relative to a healthy adult.
        shift: Largest distance of the limb from the middle of the image, in mm.
        rotation: Largest turn of the limb either way, in degrees.
        muscle: Signal of muscle; the scale is that of fat in a T1-weighted image, 1.
        fat: Signal of fat.
        suppression: Share of the fat signal that fat suppression takes away where it works.
        infiltration: Share of muscle that is replaced by fat where it is worst.
        gamma: Exponent on the signal, the display curve of the scanner.
        bias: Strength of the bias field: the signal varies by about exp(+-bias).
        noise: Standard deviation of the noise in each of the two channels of the receiver,
            relative to the signal 1.
        blur: Standard deviation of the point spread, in mm.
        gain: Factor from signal to stored grey value.
    """

    name: str
    radius: Range = (58.0, 72.0)
    fat_ring: Range = (0.10, 0.20)
    muscle_bulk: Range = (0.95, 1.10)
    shift: float = 8.0
    rotation: float = 12.0
    muscle: Range = (0.34, 0.48)
    fat: Range = (0.90, 1.0)
    suppression: Range = (0.0, 0.0)
    infiltration: Range = (0.0, 0.25)
    gamma: Range = (0.9, 1.1)
    bias: Range = (0.05, 0.2)
    noise: Range = (0.02, 0.05)
    blur: Range = (1.0, 1.4)
    gain: Range = (600.0, 1200.0)


_BASE = Population("base")

POPULATIONS: Final[Mapping[str, Population]] = {
    population.name: population
    for population in (
        _BASE,
        # a strong surface coil on large limbs
        replace(
            _BASE, name="north", radius=(70.0, 84.0), bias=(0.9, 1.4), rotation=25.0, gain=(80, 160)
        ),
        # fat suppression that works in part of the image: fat from bright to darker than muscle
        replace(_BASE, name="east", suppression=(0.65, 0.9), noise=(0.02, 0.03)),
        # short scans of small limbs: noisy, unsharp, turned
        replace(
            _BASE,
            name="south",
            radius=(44.0, 56.0),
            noise=(0.07, 0.11),
            blur=(1.8, 2.4),
            rotation=30.0,
            shift=14.0,
        ),
        # wasted muscles: thin, under thick fat, and fatty themselves
        replace(
            _BASE,
            name="west",
            fat_ring=(0.22, 0.32),
            muscle_bulk=(0.72, 0.88),
            infiltration=(0.7, 1.0),
            gamma=(0.7, 0.9),
        ),
    )
}


def draw_limb(seed: int, population: Population, index: int) -> Case:
    """Draw one person of a population: image (96, 96, 6) float32 and a mask per muscle.

    Rows run from left to right, columns from back to front, slices from feet to head. The
    same seed, population name and index give the same limb, whoever else is drawn.

    Args:
        seed: Of the whole set.
        population: What its limbs look like.
        index: Number of the person in the population, from 0.
    """
    rng = np.random.default_rng([seed, zlib.crc32(population.name.encode()), index])
    shares = _draw_tissues(rng, population)
    muscles = shares[..., _FIRST_MUSCLE:]
    name = f"{population.name}-{index:03d}"
    middle = (PIXELS - 1) / 2
    affine = np.diag([PIXEL_MM, PIXEL_MM, SLICE_MM, 1.0])
    affine[:3, 3] = [-PIXEL_MM * middle, -PIXEL_MM * middle, -SLICE_MM * (SLICES - 1) / 2]
    return Case(
        name=name,
        person=name,
        site=population.name,
        image=_take_image(rng, population, shares),
        masks={muscle: muscles[..., i] > 0.5 for i, muscle in enumerate(MUSCLES)},
        spacing=(PIXEL_MM, PIXEL_MM, SLICE_MM),
        affine=affine,
    )


def write_phantoms(path: Path, counts: Mapping[str, int], seed: int) -> DataFolder:
    """Write a folder of NIfTI pairs with so many persons of each population, and open it.

    Args:
        path: Folder to write into; made if missing.
        counts: Persons by name of their population, which becomes their site.
        seed: Of the whole set.

    Raises:
        SettingsError: There is no population of that name.
    """
    unknown = sorted(set(counts) - set(POPULATIONS))
    if unknown:
        msg = f"expected populations among {sorted(POPULATIONS)}, got {unknown}"
        raise SettingsError(msg)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["subject", "image", "label", "person", "site"])
    for name, count in counts.items():
        for index in range(count):
            case = draw_limb(seed, POPULATIONS[name], index)
            image, label = (f"{folder}/{case.name}.nii.gz" for folder in ("images", "labels"))
            write_nifti_pair(case, path / image, path / label, LABELS)
            rows.writerow([case.name, image, label, case.person, case.site])
    title = {"name": "Phantom limbs", "labels": {str(k): v for k, v in LABELS.items()}}
    write_atomic(path / DATASET, json.dumps(title, indent=1).encode())
    write_atomic(path / PARTICIPANTS, table.getvalue().encode())
    return open_folder(path)


def _draw_tissues(rng: np.random.Generator, population: Population) -> Array:
    """Return the share of each tissue in each voxel, (rows, columns, slices, tissues)."""
    shape = _draw_shape(rng, population)
    fine = (np.arange(PIXELS * _FINER) + 0.5) * PIXEL_MM / _FINER - PIXELS * PIXEL_MM / 2
    x, y = np.meshgrid(fine, fine, indexing="ij")
    slices = []
    for height in np.linspace(-1, 1, SLICES):
        tissues = np.eye(_TISSUES)[_tissue_at(x, y, float(height), shape)]
        blocks = tissues.reshape(PIXELS, _FINER, PIXELS, _FINER, _TISSUES)
        slices.append(blocks.mean(axis=(1, 3)))
    return np.stack(slices, axis=2)


@dataclass(frozen=True)
class _Shape:
    """The anatomy of one person; lengths in mm or, inside the muscle sleeve, in its radius.

    Attributes:
        radius: Mean radius of the skin.
        aspect: Depth over width.
        lobes: Amplitude and phase of the second and third wave around the skin.
        fat_ring: Thickness of the fat as a share of the radius, and where it is thickest.
        place: Position of the middle, and how far it moves from the middle slice to the last.
        turn: Rotation in radians, and how much it changes from the middle slice to the last.
        taper: How much wider the last slice is than the middle one, as a share.
        bone: Position and radius of the bone.
        cores: Per muscle the arc it lies around: centre (2), radius, start and end angle,
            half its thickness, and how much thicker it is in the last slice, as a share.
        gap: Width of the fat between two muscles.
        waves: Amplitude (2), wave vector (2) and phase of each wave that bends the sleeve.
    """

    radius: float
    aspect: float
    lobes: Array
    fat_ring: tuple[float, float]
    place: Array
    turn: tuple[float, float]
    taper: float
    bone: Array
    cores: Array
    gap: float
    waves: Array


def _draw_shape(rng: np.random.Generator, population: Population) -> _Shape:
    bone = np.array([0.08, 0.10, 0.17]) * rng.uniform(0.8, 1.2, 3)
    cores = _CORES.copy()
    cores[:, :2] += rng.normal(0, 0.02, (len(MUSCLES), 2))
    cores[:, 2] *= rng.uniform(0.95, 1.05, len(MUSCLES))
    cores[:, 3:5] += rng.normal(0, 5, (len(MUSCLES), 2))
    cores[:, 3:5] = np.deg2rad(cores[:, 3:5])
    cores[:, 5] *= rng.uniform(*population.muscle_bulk) * rng.uniform(0.9, 1.1, len(MUSCLES))
    cores[0, :2] += bone[:2]
    waves = np.concatenate(
        [rng.normal(0, 0.016, (4, 2)), rng.uniform(-6, 6, (4, 2)), rng.uniform(0, 6.3, (4, 1))],
        axis=1,
    )
    turn = np.deg2rad(population.rotation)
    return _Shape(
        radius=rng.uniform(*population.radius),
        aspect=rng.uniform(0.88, 1.04),
        lobes=np.array([[0.03, 3.0], [0.02, 3.0]]) * rng.uniform(-1, 1, (2, 2)),
        fat_ring=(rng.uniform(*population.fat_ring), rng.uniform(-np.pi, np.pi)),
        place=np.array([population.shift, population.shift, 2.0, 2.0]) * rng.uniform(-1, 1, 4),
        turn=(turn * rng.uniform(-1, 1), np.deg2rad(5) * rng.uniform(-1, 1)),
        taper=rng.uniform(0.02, 0.09),
        bone=bone,
        cores=cores,
        gap=rng.uniform(0.01, 0.04),
        waves=waves,
    )


def _tissue_at(x: Array, y: Array, height: float, shape: _Shape) -> NDArray[np.intp]:
    """Return the tissue at points in mm of the slice at ``height`` (-1 feet to 1 head)."""
    x = x - shape.place[0] - height * shape.place[2]
    y = y - shape.place[1] - height * shape.place[3]
    angle = np.arctan2(y / shape.aspect, x) - shape.turn[0] - height * shape.turn[1]
    distance = np.hypot(x, y / shape.aspect)
    skin = shape.radius * (1 + height * shape.taper)
    skin = skin * (
        1
        + shape.lobes[0, 0] * np.cos(2 * angle + shape.lobes[0, 1])
        + shape.lobes[1, 0] * np.cos(3 * angle + shape.lobes[1, 1])
    )
    share, thickest = shape.fat_ring
    sleeve = skin * (1 - share * (1 + 0.35 * np.cos(angle - thickest)))
    depth = distance / sleeve
    u, v = depth * np.cos(angle), depth * np.sin(angle)
    bone = np.hypot(u - shape.bone[0], v - shape.bone[1]) / shape.bone[2]
    for along_u, along_v, wave_u, wave_v, phase in shape.waves:
        wave = np.sin(wave_u * u + wave_v * v + phase + height)
        u, v = u + along_u * wave, v + along_v * wave

    outside = np.stack([_outside_arc(u, v, core, height) for core in shape.cores])
    nearest, second = np.sort(outside, axis=0)[:2]
    in_muscle = (nearest < 0) & (second - nearest > shape.gap) & (depth < 0.98) & (bone > 1.12)
    tissue = np.where(distance < skin, _FAT, _AIR)
    tissue = np.where(in_muscle, outside.argmin(axis=0) + _FIRST_MUSCLE, tissue)
    vessel = np.hypot(u + 0.36, v - 0.22) < 0.055
    tissue = np.where(vessel, _VESSEL, tissue)
    tissue = np.where(bone < 1, _CORTEX, tissue)
    return np.where(bone < 0.62, _MARROW, tissue)


def _outside_arc(u: Array, v: Array, core: Array, height: float) -> Array:
    """Return how far points lie outside a muscle around an arc; negative inside."""
    centre_u, centre_v, radius, start, end, thickness, growth = core
    u, v = u - centre_u, v - centre_v
    angle = np.mod(np.arctan2(v, u) - start, 2 * np.pi)
    ends = [np.hypot(u - radius * np.cos(a), v - radius * np.sin(a)) for a in (start, end)]
    beside = np.abs(np.hypot(u, v) - radius)
    away = np.where(angle <= end - start, beside, np.minimum(*ends))
    return np.asarray(away - thickness * (1 + growth * height))


def _take_image(
    rng: np.random.Generator, population: Population, shares: Array
) -> NDArray[np.float32]:
    """Return the image that the population's scanner takes of tissues, same grid, float32."""
    volume = shares.shape[:3]
    muscle, fat = rng.uniform(*population.muscle), rng.uniform(*population.fat)
    suppressed = rng.uniform(*population.suppression) / (1 + np.exp(-4 * _ramp(rng)))
    fat_here = fat * (1 - suppressed)[..., np.newaxis] * np.ones(volume)
    in_fat = shares[..., _FAT] + 0.95 * shares[..., _MARROW]
    dark = 0.06 * shares[..., _CORTEX] + 0.12 * shares[..., _VESSEL]

    texture = gaussian_filter(rng.normal(size=volume), (1.2, 1.2, 0.7))
    texture = 1 / (1 + np.exp(-2.5 * texture / texture.std()))
    signal = in_fat * fat_here + dark
    for index in range(len(MUSCLES)):
        fatty = rng.uniform(*population.infiltration) * rng.uniform(0.4, 1.0) * texture
        own = muscle * rng.uniform(0.95, 1.05)
        signal += shares[..., _FIRST_MUSCLE + index] * (own * (1 - fatty) + fat_here * fatty)

    signal = np.maximum(signal, 0) ** rng.uniform(*population.gamma)
    blur = rng.uniform(*population.blur) / PIXEL_MM
    signal = gaussian_filter(signal, (blur, blur, 0))
    signal *= np.exp(rng.uniform(*population.bias) * _ramp(rng))[..., np.newaxis]
    noise = rng.normal(0, rng.uniform(*population.noise), (2, *volume))
    magnitude = np.hypot(signal + noise[0], noise[1])
    return np.asarray(magnitude * rng.uniform(*population.gain), dtype=np.float32)


def _ramp(rng: np.random.Generator) -> Array:
    """Return a smooth field over a slice, (rows, columns), from -1 to 1 in random directions."""
    u, v = np.meshgrid(*[np.linspace(-1, 1, PIXELS)] * 2, indexing="ij")
    towards, bend = rng.uniform(0, 2 * np.pi, 2)
    field = np.cos(towards) * u + np.sin(towards) * v
    field = field + 0.5 * (np.cos(bend) * (u**2 - v**2) + np.sin(bend) * u * v)
    return np.asarray(2 * (field - field.min()) / np.ptp(field) - 1)
