"""A data folder opens as it describes itself, and splits never divide a person."""

import csv
import json
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafne_federated.core.bundles import write_bundle
from dafne_federated.core.dataset import (
    CaseRef,
    files_left_out,
    load_case,
    open_folder,
    split_persons,
    split_sites,
)
from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.volumes import Case, write_nifti_pair

LABELS = {1: "vastus", 2: "rectus"}
COLUMNS = ["subject", "image", "label", "person", "site"]


def make_case(name: str) -> Case:
    image = np.random.default_rng(len(name)).random((4, 5, 3), dtype=np.float32)
    masks = {"vastus": image > 0.5, "rectus": image < 0.2}
    return Case(name, name, "", image, masks, (1.0, 1.0, 5.0), np.diag([1.0, 1.0, 5.0, 1.0]))


def row(name: str, **changes: str) -> dict[str, str]:
    paths = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
    return {"subject": name, **paths, "person": name, "site": "north", **changes}


def write_table(path: Path, rows: Sequence[dict[str, str]], delimiter: str = ",") -> None:
    with (path / "participants.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    for name in ("b", "a"):
        paths = (tmp_path / folder / f"{name}.nii.gz" for folder in ("images", "labels"))
        write_nifti_pair(make_case(name), *paths, LABELS)
    title = {"name": "Thighs", "labels": {"0": "background", "2": "rectus", "1": "vastus"}}
    (tmp_path / "dataset.json").write_text(json.dumps(title))
    return tmp_path


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    for name in ("b", "a"):
        write_bundle(make_case(name), tmp_path / f"{name}.npz")
    return tmp_path


def refs(persons: Sequence[int]) -> list[CaseRef]:
    return [
        CaseRef(f"case-{i:03d}", f"person-{person}", f"site-{person % 3}", Path(f"{i}.npz"), None)
        for i, person in enumerate(persons)
    ]


def test_a_nifti_folder_says_what_it_holds(nifti: Path) -> None:
    write_table(nifti, [row("b", person="berta", site=""), row("a", label="")])
    folder = open_folder(nifti)
    assert (folder.name, folder.labels) == ("Thighs", {1: "vastus", 2: "rectus"})
    assert [(c.name, c.person, c.site) for c in folder.cases] == [
        ("a", "a", "north"),
        ("b", "berta", ""),
    ]
    assert folder.cases[0].label is None
    case = load_case(folder.cases[1], folder.labels)
    assert (case.name, case.person) == ("b", "berta")
    np.testing.assert_array_equal(case.masks["vastus"], make_case("b").masks["vastus"])


def test_without_a_table_files_pair_by_name(nifti: Path) -> None:
    (nifti / "labels" / "a.nii.gz").unlink()
    (nifti / "images" / "._b.nii.gz").write_bytes(b"made by a file browser")
    cases = open_folder(nifti).cases
    assert [(c.name, c.person, c.site, c.label is None) for c in cases] == [
        ("a", "a", "", True),
        ("b", "b", "", False),
    ]


def test_a_table_with_semicolons_is_read(nifti: Path) -> None:
    write_table(nifti, [row("a"), row("b")], delimiter=";")
    assert len(open_folder(nifti).cases) == 2


def test_a_folder_of_bundles_needs_no_more_than_them(bundles: Path) -> None:
    folder = open_folder(bundles)
    assert folder.labels == {1: "rectus", 2: "vastus"}
    assert [(c.name, c.person, c.is_bundle) for c in folder.cases] == [
        ("a", "a", True),
        ("b", "b", True),
    ]
    case = load_case(folder.cases[0], folder.labels)
    np.testing.assert_array_equal(case.image, make_case("a").image)


def test_a_table_tells_persons_and_sites_of_bundles(bundles: Path) -> None:
    write_table(bundles, [{"subject": "a", "person": "anna", "site": "north"}])
    folder = open_folder(bundles)
    assert [(c.name, c.person, c.site) for c in folder.cases] == [("a", "anna", "north")]
    assert files_left_out(folder) == ["b.npz"]


def test_a_damaged_bundle_does_not_keep_the_folder_shut(bundles: Path) -> None:
    (bundles / "b.npz").write_bytes(b"PK")
    folder = open_folder(bundles)
    assert len(folder.cases) == 2
    with pytest.raises(DataError, match=r"b\.npz"):
        load_case(folder.cases[1], folder.labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "../a.nii.gz"}, r"line 2, column 'image': expected a path inside the folder"),
        ({"label": "labels/../../a"}, r"line 2, column 'label': expected a path inside"),
        ({"label": "/etc/passwd"}, r"line 2, column 'label': expected a path inside"),
        ({"image": r"..\a.nii.gz"}, r"line 2, column 'image': expected a path inside"),
        ({"image": "images/c.nii.gz"}, r"line 2, column 'image': no such file 'images/c.nii.gz'"),
        ({"person": " "}, r"line 2, column 'person': expected a value, got an empty cell"),
        ({"subject": "b"}, r"got name 'b' twice"),
        ({"image": "images/b.nii.gz"}, r"got image 'b.nii.gz' twice"),
    ],
)
def test_a_bad_cell_is_named(nifti: Path, changes: dict[str, str], words: str) -> None:
    write_table(nifti, [row("a", **changes), row("b")])
    with pytest.raises(DataError, match=words):
        open_folder(nifti)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(nifti: Path, column: str) -> None:
    kept = {key: value for key, value in row("a").items() if key != column}
    write_table(nifti, [kept])
    with pytest.raises(DataError, match=rf"participants.csv: expected columns \['{column}'\]"):
        open_folder(nifti)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "expected 'labels'"),
        ('{"labels": {"background": 0}}', "expected 'labels'"),
        ('{"labels": {"1": 7}}', "expected 'labels'"),
        ('{"labels": {"0": "background"}}', "expected label names"),
        (None, "expected label names in dataset.json"),
    ],
)
def test_bad_label_names_are_refused(nifti: Path, text: str | None, words: str) -> None:
    (nifti / "dataset.json").unlink()
    if text is not None:
        (nifti / "dataset.json").write_text(text)
    with pytest.raises(DataError, match=words):
        open_folder(nifti)


def test_what_is_no_data_folder_is_refused(tmp_path: Path, nifti: Path) -> None:
    with pytest.raises(DataError, match="expected a data folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(DataError, match="either a folder 'images' or Dafne bundles"):
        open_folder(nifti / "labels")
    write_bundle(make_case("a"), nifti / "a.npz")
    with pytest.raises(DataError, match="either a folder 'images' or Dafne bundles"):
        open_folder(nifti)


def test_a_case_can_be_sent_to_another_process() -> None:
    ref = CaseRef("a", "anna", "north", Path("a.nii"), None)
    assert pickle.loads(pickle.dumps(ref)) == ref


PERSONS = st.lists(st.integers(0, 12), min_size=1, max_size=30)
SHARES = st.lists(st.floats(0, 10), min_size=1, max_size=4).filter(lambda s: sum(s) > 0.1)


@settings(max_examples=60)
@given(persons=PERSONS, shares=SHARES, seed=st.integers(0, 99))
def test_no_person_is_in_two_parts(persons: list[int], shares: list[float], seed: int) -> None:
    cases = refs(persons)
    parts = split_persons(cases, shares, seed)
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in cases)
    members = [{c.person for c in part} for part in parts]
    assert sum(map(len, members)) == len(set(persons))
    quotas = np.array(shares) / sum(shares) * len(set(persons))
    assert all(abs(len(m) - quota) < 1 + 1e-6 for m, quota in zip(members, quotas, strict=True))


@settings(max_examples=30)
@given(persons=PERSONS, seed=st.integers(0, 99))
def test_the_order_of_cases_does_not_matter(persons: list[int], seed: int) -> None:
    cases = refs(persons)
    shuffled = random.Random(seed).sample(cases, len(cases))
    assert split_persons(shuffled, (3, 2, 1), seed) == split_persons(cases, (3, 2, 1), seed)
    assert split_sites(shuffled, None, seed) == split_sites(cases, None, seed)
    assert split_sites(shuffled, 1, seed) == split_sites(cases, 1, seed)


def test_counts_are_by_largest_remainder() -> None:
    for shares, counts in [((0.7, 0.2, 0.1), [7, 2, 1]), ((1, 1, 1), [4, 3, 3]), ((1, 0), [10, 0])]:
        assert [len(part) for part in split_persons(refs(range(10)), shares, 5)] == counts


def test_the_seed_chooses_the_split() -> None:
    splits = {tuple(c.name for c in split_persons(refs(range(10)), (1, 1), s)[0]) for s in range(9)}
    assert len(splits) > 5


@pytest.mark.parametrize("shares", [(0, 0), (1, -1), (1, float("nan")), ()])
def test_impossible_shares_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="expected shares"):
        split_persons(refs([1, 2]), shares, 0)


@settings(max_examples=40)
@given(persons=PERSONS, number=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_every_made_up_site_has_its_own_persons(
    persons: list[int], number: int, seed: int, data: st.DataObject
) -> None:
    cases = refs(persons)
    sizes = data.draw(st.lists(st.floats(0.1, 9), min_size=number, max_size=number))
    if number > len(set(persons)):
        with pytest.raises(DataError, match="expected 1 to"):
            split_sites(cases, number, seed, sizes)
        return
    sites = split_sites(cases, number, seed, sizes)
    assert list(sites) == [f"site-{i}" for i in range(1, number + 1)]
    members = [{c.person for c in group} for group in sites.values()]
    assert all(members)
    assert sum(map(len, members)) == len(set(persons))


def test_named_sites_are_taken_as_they_are() -> None:
    sites = split_sites(refs([0, 1, 2, 3]), None, 0)
    assert {site: [c.person for c in group] for site, group in sites.items()} == {
        "site-0": ["person-0", "person-3"],
        "site-1": ["person-1"],
        "site-2": ["person-2"],
    }
    nameless = CaseRef("x", "x", "", Path("x.npz"), None)
    with pytest.raises(DataError, match="expected a site for every case, got none for 'x'"):
        split_sites([nameless], None, 0)
    with pytest.raises(SettingsError, match="expected 2 relative sizes, one per site, got 1"):
        split_sites(refs([0, 1]), 2, 0, [1.0])


@pytest.mark.skipif(
    "DAFNE_FEDERATED_TEST_DATA" not in os.environ,
    reason="DAFNE_FEDERATED_TEST_DATA names no folder of real data",
)
@pytest.mark.parametrize(
    ("name", "cases", "persons", "sites"),
    [("spinalcord_gm", 6, 4, 4), ("lumbar_spine", 28, 28, 1), ("hippocampus", 100, 100, 3)],
)
def test_real_folders_open(name: str, cases: int, persons: int, sites: int) -> None:
    folder = open_folder(Path(os.environ["DAFNE_FEDERATED_TEST_DATA"]) / name)
    assert len(folder.cases) == cases
    assert len({case.person for case in folder.cases}) == persons
    assert len(split_sites(folder.cases, None, 0)) == sites
    first = load_case(folder.cases[0], folder.labels)
    assert set(first.masks) == set(folder.labels.values())
    assert all(mask.any() for mask in first.masks.values())
    assert files_left_out(folder) == []
