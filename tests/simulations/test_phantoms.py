"""Phantom limbs are the same whoever else is drawn, differ by person, and pass the data check."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label

from dafne_federated.core.data_check import check_folder
from dafne_federated.core.dataset import load_case, split_sites
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.findings import ModelExpectation
from dafne_federated.core.volumes import Case, orientation, plane
from dafne_federated.simulations.phantoms import MUSCLES, POPULATIONS, draw_limb, write_phantoms


@pytest.fixture(scope="module")
def limbs() -> dict[str, list[Case]]:
    return {
        name: [draw_limb(7, population, index) for index in range(3)]
        for name, population in POPULATIONS.items()
    }


def test_a_person_does_not_depend_on_who_else_is_drawn(tmp_path: Path) -> None:
    few = write_phantoms(tmp_path / "few", {"east": 1}, seed=3)
    many = write_phantoms(tmp_path / "many", {"base": 1, "east": 2}, seed=3)
    again = {case.name: case for case in many.cases}
    for ref in few.cases:
        same = again[ref.name]
        assert ref.image.read_bytes() == same.image.read_bytes()
        assert ref.label is not None
        assert same.label is not None
        assert ref.label.read_bytes() == same.label.read_bytes()


def test_persons_seeds_and_populations_differ(limbs: dict[str, list[Case]]) -> None:
    images = [case.image.tobytes() for cases in limbs.values() for case in cases]
    images.append(draw_limb(8, POPULATIONS["base"], 0).image.tobytes())
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("name", POPULATIONS)
def test_every_muscle_is_one_piece_in_every_slice(name: str, limbs: dict[str, list[Case]]) -> None:
    for case in limbs[name]:
        assert set(case.masks) == set(MUSCLES)
        assert sum(mask.astype(int) for mask in case.masks.values()).max() == 1
        for muscle, mask in case.masks.items():
            pieces, _ = label(mask)
            largest = np.bincount(pieces.ravel())[1:].max()
            assert largest > 0.97 * mask.sum(), (case.name, muscle)
            assert mask.sum(axis=(0, 1)).min() > 20, (case.name, muscle)


@pytest.mark.parametrize("name", POPULATIONS)
def test_slices_change_smoothly(name: str, limbs: dict[str, list[Case]]) -> None:
    for case in limbs[name]:
        for mask in case.masks.values():
            above, below = mask[..., 1:], mask[..., :-1]
            assert 2 * (above & below).sum() / (above.sum() + below.sum()) > 0.8


def test_a_limb_lies_inside_its_image_and_is_axial(limbs: dict[str, list[Case]]) -> None:
    for case in (case for cases in limbs.values() for case in cases):
        assert case.image.shape == (96, 96, 6)
        assert case.image.dtype == np.float32
        assert np.isfinite(case.image).all()
        assert (case.image >= 0).all()
        assert case.affine is not None
        assert (orientation(case.affine), plane(case.affine)) == ("RAS", "Axial")
        together = np.any(list(case.masks.values()), axis=0)
        assert not together[[0, -1]].any()
        assert not together[:, [0, -1]].any()


def test_populations_differ_in_what_they_say(limbs: dict[str, list[Case]]) -> None:
    def muscle(case: Case) -> np.ndarray:
        return np.asarray(np.any(list(case.masks.values()), axis=0))

    def size(case: Case) -> float:
        return float(muscle(case).sum())

    def spread(case: Case) -> float:
        return float(np.std(case.image[muscle(case)]) / np.mean(case.image[muscle(case)]))

    def brightness(case: Case) -> float:
        return float(np.mean(case.image[muscle(case)]) / np.percentile(case.image, 99))

    def average(name: str, measure: Callable[[Case], float]) -> float:
        return float(np.mean([measure(case) for case in limbs[name]]))

    assert average("south", size) < 0.8 * average("base", size)
    assert average("west", size) < 0.7 * average("base", size)
    assert average("north", size) > 1.2 * average("base", size)
    assert average("north", spread) > 1.3 * average("base", spread)
    assert average("south", spread) > 1.3 * average("base", spread)
    assert average("west", brightness) > 1.2 * average("base", brightness)
    assert average("east", brightness) > 1.2 * average("base", brightness)


def test_a_folder_of_phantoms_passes_the_check(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path, dict.fromkeys(POPULATIONS, 1), seed=1)
    assert list(split_sites(folder.cases, None, 0)) == sorted(POPULATIONS)
    expected = ModelExpectation(MUSCLES, "Axial", (2.0, 2.0), (96, 96))
    assert [f.severity for f in check_folder(folder, expected)] == ["note"]  # not as Dafne shows it
    (ref,) = (case for case in folder.cases if case.site == "west")
    case, drawn = load_case(ref, folder.labels), draw_limb(1, POPULATIONS["west"], 0)
    np.testing.assert_array_equal(case.image, drawn.image)
    assert case.spacing == drawn.spacing
    np.testing.assert_array_equal(case.affine, drawn.affine)
    for name, mask in drawn.masks.items():
        np.testing.assert_array_equal(case.masks[name], mask)


def test_an_unknown_population_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"populations among .* got \['centre'\]"):
        write_phantoms(tmp_path, {"centre": 1}, seed=0)
