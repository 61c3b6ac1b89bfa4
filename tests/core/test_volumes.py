"""Images and label maps come back as they were written; what is damaged is refused by name."""

import contextlib
import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dafne_federated.core.errors import DataError
from dafne_federated.core.volumes import (
    DAFNE_ORIENTATION,
    Case,
    geometry_difference,
    orientation,
    plane,
    read_label_map,
    read_nifti_pair,
    read_volume,
    write_nifti_pair,
)

LABELS = {1: "vastus", 3: "rectus"}
WHO = {"name": "one", "person": "anna", "site": "north"}


def make_case(seed: int = 0, affine: np.ndarray | None = None) -> Case:
    rng = np.random.default_rng(seed)
    rows, columns, slices = (int(n) for n in rng.integers(2, 7, 3))
    label = rng.integers(0, 3, (rows, columns, slices))
    image = rng.normal(0, 1e3, (rows, columns, slices)).astype(np.float32)
    masks = {"vastus": label == 1, "rectus": label == 2}
    return Case(image=image, masks=masks, spacing=(0.5, 0.75, 8.0), affine=affine, **WHO)


def upright(code: str = "RAS", spacing: tuple[float, ...] = (0.5, 0.75, 8.0)) -> np.ndarray:
    wanted = nib.orientations.axcodes2ornt(code)
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(wanted):
        affine[int(world), axis] = sign * spacing[axis]
    affine[:, 3] = [12.5, -7.0, 100.0, 1.0]
    return affine


def equal(one: Case, other: Case) -> None:
    assert (one.name, one.person, one.site) == (other.name, other.person, other.site)
    assert one.spacing == other.spacing
    assert one.image.dtype == other.image.dtype == np.float32
    np.testing.assert_array_equal(one.image, other.image)
    assert set(one.masks) == set(other.masks)
    for name, mask in one.masks.items():
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, other.masks[name])
    assert (one.affine is None) == (other.affine is None)
    if one.affine is not None and other.affine is not None:
        np.testing.assert_array_equal(one.affine, other.affine)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    ending=st.sampled_from([".nii", ".nii.gz"]),
    code=st.sampled_from(["RAS", "LPS", "PSR", "SLA", None]),
)
def test_what_is_written_is_what_is_read(
    tmp_path: Path, seed: int, ending: str, code: str | None
) -> None:
    case = make_case(seed, None if code is None else upright(code))
    image, label = tmp_path / f"i{ending}", tmp_path / f"l{ending}"
    write_nifti_pair(case, image, label, LABELS)
    equal(read_nifti_pair(image, label, LABELS, **WHO), case)


def test_equal_cases_are_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_nifti_pair(make_case(), tmp_path / f"{name}.nii.gz", None, LABELS)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_label_without_voxels_is_an_empty_mask(tmp_path: Path) -> None:
    case = make_case()
    write_nifti_pair(case, tmp_path / "i.nii", tmp_path / "l.nii", LABELS)
    more = {**LABELS, 7: "adductor"}
    read = read_nifti_pair(tmp_path / "i.nii", tmp_path / "l.nii", more, **WHO)
    assert read.masks["adductor"].shape == case.image.shape
    assert not read.masks["adductor"].any()


def test_numbers_that_share_a_name_are_one_label(tmp_path: Path) -> None:
    case = make_case()
    write_nifti_pair(case, tmp_path / "i.nii", tmp_path / "l.nii", LABELS)
    same = {1: "thigh", 3: "thigh"}
    read = read_nifti_pair(tmp_path / "i.nii", tmp_path / "l.nii", same, **WHO)
    expected = case.masks["vastus"] | case.masks["rectus"]
    np.testing.assert_array_equal(read.masks["thigh"], expected)


def test_without_labels_no_label_is_annotated(tmp_path: Path) -> None:
    write_nifti_pair(make_case(), tmp_path / "i.nii", None, LABELS)
    assert read_nifti_pair(tmp_path / "i.nii", None, LABELS, **WHO).masks == {}


def test_scaled_integers_are_read_in_their_own_unit(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.full((2, 3, 4), 5, np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "i.nii")
    assert (read_volume(tmp_path / "i.nii").array == 12.5).all()


def test_a_single_time_point_is_a_volume(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((2, 3, 4, 1), np.uint8), np.eye(4)), tmp_path / "i.nii")
    assert read_volume(tmp_path / "i.nii").array.shape == (2, 3, 4)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 1, 100, 351, 0.5, 0.99])
def test_a_file_cut_short_is_one_clear_line(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"i{ending}"
    write_nifti_pair(make_case(), path, None, LABELS)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(DataError, match=f"i{ending}': damaged, cut short or not NIfTI") as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16))
def test_random_damage_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "i.nii"
    write_nifti_pair(make_case(), path, None, LABELS)
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, 352, 8):
        data[place] = rng.integers(0, 256)
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        read_volume(path)


def test_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "i.nii").write_text("not an image")
    with pytest.raises(DataError, match="not NIfTI"):
        read_volume(tmp_path / "i.nii")
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "none.nii")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 4), np.float32), r"expected real numbers .* got float32 of shape \(3, 4\)"),
        (np.zeros((2, 3, 4, 5), np.float32), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((2, 3, 4), np.complex64), "got complex64"),
    ],
)
def test_what_is_not_a_volume_is_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "i.nii")
    with pytest.raises(DataError, match=words):
        read_volume(tmp_path / "i.nii")


@pytest.mark.parametrize("value", [0.5, -1, 70000, np.nan])
def test_labels_must_be_whole_numbers(tmp_path: Path, value: float) -> None:
    label = np.zeros((2, 3, 4), np.float32)
    label[1, 1, 1] = value
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "l.nii")
    with pytest.raises(DataError, match=f"whole label numbers from 0 to 65535, got {value}"):
        read_label_map(tmp_path / "l.nii")


def test_a_number_without_a_name_is_refused(tmp_path: Path) -> None:
    write_nifti_pair(make_case(), tmp_path / "i.nii", tmp_path / "l.nii", LABELS)
    with pytest.raises(DataError, match=r"l.nii': expected only \[1\] as labels, got \[3\]"):
        read_nifti_pair(tmp_path / "i.nii", tmp_path / "l.nii", {1: "vastus"}, **WHO)


def test_labels_of_another_place_are_refused(tmp_path: Path) -> None:
    case = make_case(affine=upright())
    write_nifti_pair(case, tmp_path / "i.nii", tmp_path / "l.nii", LABELS)
    label = nib.load(tmp_path / "l.nii")
    moved = label.affine + np.outer([0, 0, 1, 0], [0, 0, 0, 30.0])
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), moved), tmp_path / "moved.nii")
    with pytest.raises(DataError, match=r"moved.nii' does not fit its image: .* 30.0 mm apart"):
        read_nifti_pair(tmp_path / "i.nii", tmp_path / "moved.nii", LABELS, **WHO)


def test_rounding_in_a_header_is_forgiven(tmp_path: Path) -> None:
    case = make_case(affine=upright())
    write_nifti_pair(case, tmp_path / "i.nii", None, LABELS)
    volume = read_volume(tmp_path / "i.nii")
    assert volume.affine is not None
    for shift, fits in [(0.0, True), (0.2, True), (0.4, False)]:  # half a voxel is 0.25 mm
        moved = type(volume)(volume.array, volume.spacing, volume.affine + shift * np.eye(4, k=3))
        assert (geometry_difference(volume, moved) is None) == fits


def test_overlapping_masks_do_not_fit_one_map(tmp_path: Path) -> None:
    case = make_case()
    case.masks["rectus"] |= case.masks["vastus"]
    with pytest.raises(DataError, match="overlaps another"):
        write_nifti_pair(case, tmp_path / "i.nii", tmp_path / "l.nii", LABELS)
    with pytest.raises(DataError, match=r"expected only labels \['vastus'\], got \['rectus'\]"):
        write_nifti_pair(case, tmp_path / "i.nii", tmp_path / "l.nii", {1: "vastus"})


@pytest.mark.parametrize(
    ("code", "name"), [("RAS", "Axial"), ("LPI", "Axial"), ("PSR", "Sagittal"), ("RIP", "Coronal")]
)
def test_orientation_is_read_from_the_affine(code: str, name: str) -> None:
    assert orientation(upright(code)) == code
    assert plane(upright(code)) == name


def test_slightly_oblique_slices_count_as_the_nearest_plane() -> None:
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    assert plane(turn @ upright("RAS")) == "Axial"


def test_the_planes_of_dafne_are_what_they_are_called() -> None:
    assert {name: plane(upright(code)) for name, code in DAFNE_ORIENTATION.items()} == {
        name: name for name in DAFNE_ORIENTATION
    }


def test_a_flat_affine_has_no_orientation() -> None:
    with pytest.raises(DataError, match="three directions"):
        orientation(np.diag([1.0, 0.0, 1.0, 1.0]))


def test_gzip_is_what_the_ending_says(tmp_path: Path) -> None:
    write_nifti_pair(make_case(), tmp_path / "i.nii.gz", None, LABELS)
    assert gzip.decompress((tmp_path / "i.nii.gz").read_bytes())[344:347] == b"n+1"
