"""Each fault of a data folder is found, in words a radiographer understands."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dafne_federated.core.bundles import write_bundle
from dafne_federated.core.data_check import check_folder
from dafne_federated.core.dataset import open_folder
from dafne_federated.core.findings import Finding, ModelExpectation
from dafne_federated.core.site_labels import site_labels
from dafne_federated.core.volumes import Case, write_nifti_pair

LABELS = {1: "vastus", 2: "rectus"}
NAMES = ("one", "two", "three")
MODEL = ModelExpectation(("vastus", "rectus"), "Axial", (1.0, 1.0), (24, 24))
SHAPE = (24, 24, 4)
JARGON = ("affine", "dtype", "array", "Traceback", "Error:", "NaN", "voxel size:")


def make_case(name: str) -> Case:
    rng = np.random.default_rng(list(name.encode()))
    masks = {label: np.zeros(SHAPE, bool) for label in LABELS.values()}
    masks["vastus"][4:10, 4:20] = True
    masks["rectus"][12:20, 4:20] = True
    # rows to the right, columns to the back, slices to the feet: as Dafne shows axial images
    affine = np.diag([1.0, -1.0, -5.0, 1.0])
    image = rng.random(SHAPE, dtype=np.float32)
    return Case(name, name, "", image, masks, (1.0, 1.0, 5.0), affine)


def write_case(path: Path, case: Case) -> None:
    image, label = (path / folder / f"{case.name}.nii.gz" for folder in ("images", "labels"))
    write_nifti_pair(case, image, label, LABELS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for name in NAMES:
        write_case(tmp_path, make_case(name))
    title = {"labels": {str(number): name for number, name in LABELS.items()}}
    (tmp_path / "dataset.json").write_text(json.dumps(title))
    return tmp_path


def check(path: Path, expected: ModelExpectation | None = MODEL) -> list[Finding]:
    findings = check_folder(open_folder(path), expected)
    for finding in findings:
        assert not any(word in finding.what + finding.advice for word in JARGON), finding
        assert finding.what[0].isupper()
        assert finding.what.endswith(".")
        assert finding.advice.endswith(".")
    return findings


def edit(path: Path, change: Callable[[np.ndarray, np.ndarray], object]) -> None:
    """Rewrite a NIfTI file after ``change(array, affine)``, which works in place."""
    stored = nib.load(path)
    array, affine = np.array(stored.dataobj), stored.affine.copy()
    changed = change(array, affine)
    result = changed if isinstance(changed, np.ndarray) else array
    nib.save(nib.Nifti1Image(result, affine), path)


def test_a_good_folder_has_no_findings(path: Path) -> None:
    assert check(path) == []
    assert check(path, None) == []


def set_at(place: object, value: float) -> Callable[[np.ndarray, np.ndarray], None]:
    def change(array: np.ndarray, _: np.ndarray) -> None:
        array[place] = value

    return change


def move(_: np.ndarray, affine: np.ndarray) -> None:
    affine[2, 3] += 40


def turn_coronal(_: np.ndarray, affine: np.ndarray) -> None:
    affine[:3, :3] = affine[:3, :3][[0, 2, 1]]


def turn_on_its_side(_: np.ndarray, affine: np.ndarray) -> None:
    affine[:3, :2] = affine[:3, 1::-1]


def mirror(_: np.ndarray, affine: np.ndarray) -> None:
    affine[0, 0] *= -1


def enlarge(_: np.ndarray, affine: np.ndarray) -> None:
    affine[:2, :2] *= 2.5


ANYWHERE = (...,)


@pytest.mark.parametrize(
    ("files", "change", "severity", "words"),
    [
        ("images", set_at((0, 0, 0), np.nan), "error", "that hold no number, or infinity: 1."),
        ("images", set_at((0, 0, 0), np.inf), "error", "that hold no number, or infinity: 1."),
        ("images", set_at(ANYWHERE, 7), "error", "empty: every voxel has the value 7"),
        ("images", set_at((..., 1), 0), "warning", "slices that show nothing"),
        ("images", lambda array, _: array[:-1], "error", "23 x 24 x 4 voxels, the labels 24 x 24"),
        ("labels", lambda array, _: array[..., :-1], "error", "the labels 24 x 24 x 3"),
        ("labels", move, "error", "40.0 mm apart in the scanner"),
        ("labels", enlarge, "error", "the labels' 2.5 x 2.5 x 5 mm"),
        ("labels", set_at((0, 0, 0), 9), "error", "Numbers without a name in the labels: 9"),
        ("labels", set_at((0, 0, 0), 200), "error", "without a name in the labels: 200"),
        ("labels", set_at(ANYWHERE, 0), "warning", "No label is drawn on this image"),
        ("labels", set_at(slice(12, 20), 0), "note", "Not drawn here: rectus"),
        ("labels", set_at(slice(12, 20), 0), "warning", "No slice of it has enough labels"),
        ("both", turn_coronal, "error", "The slices are coronal, the model works on axial ones"),
        ("both", turn_on_its_side, "warning", "The slices lie on their side"),
        ("both", enlarge, "warning", "The pixels measure 2.5 x 2.5 mm, those of the model 1 x 1"),
        ("both", enlarge, "warning", "The model does not see"),
    ],
)
def test_a_fault_in_one_case_is_found(
    path: Path,
    files: str,
    change: Callable[[np.ndarray, np.ndarray], object],
    severity: str,
    words: str,
) -> None:
    for folder in ("images", "labels") if files == "both" else (files,):
        edit(path / folder / "two.nii.gz", change)
    found = [finding for finding in check(path) if words in finding.what]
    assert [(finding.severity, finding.case) for finding in found] == [(severity, "two")]


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_a_file_that_cannot_be_read_does_not_end_the_check(path: Path, folder: str) -> None:
    file = path / folder / "one.nii.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:500]))
    edit(path / "images" / "two.nii.gz", set_at(ANYWHERE, 0))
    errors = [finding for finding in check(path) if finding.severity == "error"]
    assert [finding.case for finding in errors] == ["one", "two"]
    assert f"It cannot be read: '{folder}/one.nii.gz'" in errors[0].what


def test_a_case_without_labels_is_found(path: Path) -> None:
    (path / "labels" / "one.nii.gz").unlink()
    assert [(f.severity, f.case) for f in check(path)] == [("warning", "one")]


def test_labels_that_the_model_does_not_know_are_found(path: Path) -> None:
    title = {"labels": {"1": "Vastus", "2": "rectus"}}
    (path / "dataset.json").write_text(json.dumps(title))
    findings = check(path)
    unknown = [f for f in findings if "'Vastus' is not among the labels asked for" in f.what]
    assert [f.case for f in unknown] == sorted(NAMES)
    assert "Rename it if it means 'vastus'" in unknown[0].advice
    (absent,) = (f for f in findings if f.what == "Not annotated in this folder: vastus.")
    assert (absent.case, absent.severity) == ("", "warning")
    assert "not taken for background" in absent.advice
    assert '"label_names": {"vastus": "Vastus"}' in absent.advice


def test_a_label_that_the_table_knows_and_nobody_drew_is_said_to_count_as_absent(
    path: Path,
) -> None:
    for name in NAMES:
        edit(path / "labels" / f"{name}.nii.gz", lambda array, _: np.where(array == 1, 2, array))
    (absent,) = (f for f in check(path) if f.what == "Drawn in no case at all: vastus.")
    assert absent.severity == "warning"
    assert "leave them out of 'annotated'" in absent.advice


def test_the_settings_of_a_site_say_what_labels_are_called_and_which_are_missing(
    path: Path,
) -> None:
    title = {"labels": {"1": "Vastus lateralis", "2": "rectus"}}
    (path / "dataset.json").write_text(json.dumps(title))
    folder = open_folder(path)
    known = folder.labels.values()
    here = site_labels(MODEL.labels, known, {"vastus": "Vastus lateralis"})
    (note,) = check_folder(folder, MODEL, here=here)
    assert (note.severity, note.case) == ("note", "")
    assert note.what == "The model's 'vastus' is called 'Vastus lateralis' in this folder."
    here = site_labels(MODEL.labels, known, annotated=("rectus",))
    whole = [f.what for f in check_folder(folder, MODEL, here=here) if not f.case]
    assert whole == [
        "Dafne can learn from 0 slices of this folder and needs at least 5.",  # 2 labels of 2
        "Not annotated in this folder: vastus.",
    ]


def test_a_folder_without_any_label_of_the_model_is_an_error(path: Path) -> None:
    findings = check(path, replace(MODEL, labels=("tibialis", "soleus")))
    assert "None of the labels asked for is drawn" in " ".join(
        f.what for f in findings if f.severity == "error"
    )


def test_left_and_right_count_as_the_label(tmp_path: Path) -> None:
    for name in NAMES:
        case = make_case(name)
        masks = {
            f"{label}{side}": case.masks[label]
            for label in LABELS.values()
            for side in ("_L", "_R")
        }
        write_bundle(replace(case, masks=masks), tmp_path / f"{name}.npz")
    assert check(tmp_path) == []


def test_an_unknown_position_in_the_body_is_found(tmp_path: Path) -> None:
    for name in NAMES:
        write_bundle(replace(make_case(name), affine=None), tmp_path / f"{name}.npz")
    assert {(f.severity, f.case) for f in check(tmp_path)} == {("warning", name) for name in NAMES}


def test_the_same_image_twice_is_found(path: Path) -> None:
    case = make_case("one")
    write_case(path, replace(case, name="copy"))
    rows = [f"{name},images/{name}.nii.gz,labels/{name}.nii.gz" for name in ("copy", "one")]
    table = path / "participants.csv"
    for persons, severity in [(("anna", "anna"), "warning"), (("anna", "berta"), "error")]:
        lines = [f"{row},{person},north" for row, person in zip(rows, persons, strict=True)]
        table.write_text("\n".join(["subject,image,label,person,site", *lines]))
        found = [f for f in check(path) if f.what.startswith("The image is the same")]
        assert [(f.severity, f.case) for f in found] == [(severity, "one")]
        left_out = [f for f in check(path) if "participants.csv does not list" in f.what]
        assert "three.nii.gz and two.nii.gz" in left_out[0].what


def test_a_person_in_two_parts_or_at_two_sites_is_found(path: Path) -> None:
    rows = [
        f"{name},images/{name}.nii.gz,labels/{name}.nii.gz,{person},{site}"
        for name, person, site in [
            ("one", "anna", "x"),
            ("two", "anna", "y"),
            ("three", "eva", "x"),
        ]
    ]
    lines = ["subject,image,label,person,site", *rows]
    (path / "participants.csv").write_text("\n".join(lines))
    folder = open_folder(path)
    by_name = {case.name: case for case in folder.cases}
    splits = {"training": [by_name["one"], by_name["three"]], "test": [by_name["two"]]}
    findings = check_folder(folder, MODEL, splits)
    assert [(f.severity, f.what) for f in findings] == [
        ("error", "The person 'anna' is in more than one part: training and test."),
        ("warning", "The person 'anna' is listed at more than one site: x and y."),
    ]


def test_images_stored_in_different_ways_are_found(path: Path) -> None:
    for folder in ("images", "labels"):
        edit(path / folder / "two.nii.gz", mirror)
    found = [f for f in check(path) if "not all stored the same way round" in f.what]
    assert [(f.severity, f.case) for f in found] == [("warning", "")]
    assert found[0].what.endswith("towards right, back, feet, but not two.")


def test_a_folder_stored_unlike_dafne_shows_it_is_a_note(path: Path) -> None:
    for name in NAMES:
        for folder in ("images", "labels"):
            edit(path / folder / f"{name}.nii.gz", mirror)
    assert [f.severity for f in check(path)] == ["note"]


def test_too_few_slices_for_dafne_are_found(path: Path) -> None:
    findings = check(path, replace(MODEL, least_slices=13))
    assert [(f.severity, f.what) for f in findings] == [
        ("error", "Dafne can learn from 12 slices of this folder and needs at least 13.")
    ]
    edit(path / "labels" / "one.nii.gz", set_at((slice(12, 20), slice(None), 0), 0))
    assert [(f.severity, f.what) for f in check(path)] == [
        ("note", "Dafne will skip 1 of the 12 slices with labels.")
    ]


@pytest.mark.parametrize(("pixels", "percent"), [(24, []), (26, [7.7]), (48, [50.0]), (7, [])])
def test_what_is_cut_off_is_counted(tmp_path: Path, pixels: int, percent: list[float]) -> None:
    case = make_case("one")
    image = np.random.default_rng(0).random((24, pixels, 8), dtype=np.float32)
    masks = {"vastus": np.zeros(image.shape, bool), "rectus": np.zeros(image.shape, bool)}
    masks["vastus"][:12] = masks["rectus"][12:] = True
    write_bundle(replace(case, image=image, masks=masks), tmp_path / "one.npz")
    cut = [f for f in check(tmp_path, MODEL) if "The model does not see" in f.what]
    assert [float(f.what.split()[5]) for f in cut] == percent


def test_progress_counts_every_case(path: Path) -> None:
    (path / "images" / "one.nii.gz").write_bytes(b"")
    calls: list[tuple[int, int]] = []
    check_folder(open_folder(path), None, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_what_a_model_does_not_state_is_said(path: Path) -> None:
    (finding,) = check(path, ModelExpectation((), "", None, None))
    assert finding.severity == "note"
    assert "its label names, plane, pixel size and image size" in finding.what


@pytest.mark.skipif(
    "DAFNE_FEDERATED_TEST_DATA" not in os.environ,
    reason="DAFNE_FEDERATED_TEST_DATA names no folder of real data",
)
@pytest.mark.parametrize(
    ("name", "plane", "notes"),
    [("spinalcord_gm", "Axial", 1), ("lumbar_spine", "Sagittal", 1), ("hippocampus", "Axial", 2)],
)
def test_real_data_have_no_errors(name: str, plane: str, notes: int) -> None:
    folder = open_folder(Path(os.environ["DAFNE_FEDERATED_TEST_DATA"]) / name)
    expected = ModelExpectation(tuple(folder.labels.values()), plane, (0.8, 0.8), (400, 400))
    findings = check_folder(folder, expected)
    assert [f.severity for f in findings] == ["note"] * notes
