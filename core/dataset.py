"""A folder of examinations, and how its persons are dealt to parts and sites."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dafne_federated.core.bundles import bundle_labels, read_bundle
from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.volumes import Case, read_nifti_pair

PARTICIPANTS = "participants.csv"
DATASET = "dataset.json"
_NIFTI = (".nii.gz", ".nii")
_BUNDLE = ".npz"


@dataclass(frozen=True)
class CaseRef:
    """Where one case lies; cheap to keep and to send to another process.

    Attributes:
        name: File stem or subject, unique in its folder.
        person: Who was scanned.
        site: Where; empty when unknown.
        image: NIfTI image, or a Dafne bundle that holds image and masks.
        label: NIfTI label map; None for a bundle and for an image without masks.
    """

    name: str
    person: str
    site: str
    image: Path
    label: Path | None

    @property
    def is_bundle(self) -> bool:
        """Whether image and masks lie in one Dafne bundle."""
        return self.image.suffix == _BUNDLE


@dataclass(frozen=True)
class DataFolder:
    """What a data folder says about itself; no image has been read.

    Attributes:
        path: The folder.
        name: Title from dataset.json, or the folder's name.
        labels: Label names by number, from 1; 0 is background and never listed.
        cases: All cases, sorted by name.
    """

    path: Path
    name: str
    labels: dict[int, str]
    cases: tuple[CaseRef, ...]


def open_folder(path: Path) -> DataFolder:
    """Open a folder of NIfTI pairs or of Dafne bundles.

    A NIfTI folder holds ``images/``, ``labels/`` and a dataset.json with the label names.
    participants.csv (subject, image, label, person, site; further columns are ignored) says
    who is who; without it, image and label map share a file name and every file is a person of
    its own. A folder of bundles needs neither file; its participants.csv lists subject (file
    stem), person and site.

    Raises:
        DataError: The folder is neither, a table or title is not as described, or a file that
            the table names is missing or lies elsewhere.
    """
    if not path.is_dir():
        msg = f"expected a data folder, got {str(path)!r}"
        raise DataError(msg)
    bundles = _files(path, (_BUNDLE,))
    if (path / "images").is_dir() == bool(bundles):
        msg = f"{path.name!r}: expected either a folder 'images' or Dafne bundles (*{_BUNDLE})"
        raise DataError(msg)
    title, labels = _title(path)
    if (path / PARTICIPANTS).is_file():
        cases = list(_listed(path, bundles=bool(bundles)))
    else:
        cases = [_unlisted_ref(path, file) for file in bundles or _images(path)]
    if not cases:
        msg = f"{path.name!r}: expected at least one case, got none"
        raise DataError(msg)
    _refuse_repeats(path, cases)
    if not labels and bundles:
        labels = dict(enumerate(_drawn_names(cases), start=1))
    elif not labels:
        msg = f"{path.name!r}: expected label names in {DATASET}, as {{'labels': {{'1': 'name'}}}}"
        raise DataError(msg)
    return DataFolder(path, title, labels, tuple(sorted(cases, key=lambda case: case.name)))


def load_case(ref: CaseRef, labels: Mapping[int, str]) -> Case:
    """Read one case; ``labels`` names the numbers of a NIfTI label map.

    A bundle names its masks itself and keeps them all.

    Raises:
        DataError: A file is missing or damaged, or image and labels do not fit together.
    """
    if ref.is_bundle:
        return read_bundle(ref.image, name=ref.name, person=ref.person, site=ref.site)
    return read_nifti_pair(
        ref.image, ref.label, labels, name=ref.name, person=ref.person, site=ref.site
    )


def label_names(ref: CaseRef, folder: DataFolder) -> list[str]:
    """Return the names of the labels that a case can have; none where it has no masks."""
    if ref.is_bundle:
        return bundle_labels(ref.image)
    return [] if ref.label is None else list(folder.labels.values())


def files_left_out(folder: DataFolder) -> list[str]:
    """Return the names of images in the folder that no case refers to, sorted."""
    found = _files(folder.path, (_BUNDLE,)) or _images(folder.path)
    return sorted({file.name for file in found} - {case.image.name for case in folder.cases})


def split_persons(
    cases: Sequence[CaseRef], shares: Sequence[float], seed: int
) -> list[list[CaseRef]]:
    """Deal cases into parts so that no person is in two of them.

    Persons are shuffled by ``seed`` and counted out by largest remainder, so a part may stay
    empty where there are few. The order in which cases are given does not matter.

    Args:
        cases: What to split.
        shares: Relative size of each part, in persons; need not add up to 1.
        seed: Which of the possible splits.

    Returns:
        One list of cases per share, each sorted by name.

    Raises:
        SettingsError: A share is negative or not finite, or all are 0.
    """
    counts = _counts(len({case.person for case in cases}), shares)
    return _deal(cases, counts, seed)


def split_sites(
    cases: Sequence[CaseRef],
    number: int | None,
    seed: int,
    sizes: Sequence[float] | None = None,
) -> dict[str, list[CaseRef]]:
    """Group cases by their site, or deal persons into ``number`` sites of our own.

    Args:
        cases: What to split.
        number: None for the sites that the cases name; otherwise how many to make up, as
            "site-1", "site-2" and so on. No person is in two of these.
        seed: Which of the possible deals; unused for named sites.
        sizes: Relative size of each made-up site, in persons; equal if None. Every site gets
            at least one person.

    Returns:
        Cases by site, each list sorted by name.

    Raises:
        DataError: A case names no site, or there are fewer persons than sites.
        SettingsError: ``sizes`` does not fit ``number``.
    """
    if number is None:
        nameless = sorted(case.name for case in cases if not case.site)
        if nameless:
            msg = f"expected a site for every case, got none for {nameless[0]!r}"
            raise DataError(f"{msg} and {len(nameless) - 1} more; deal persons into sites instead")
        ordered = sorted(cases, key=lambda case: case.name)
        sites = sorted({case.site for case in ordered})
        return {site: [case for case in ordered if case.site == site] for site in sites}
    persons = len({case.person for case in cases})
    if not 1 <= number <= persons:
        msg = f"expected 1 to {persons} sites for {persons} persons, got {number}"
        raise DataError(msg)
    shares = [1.0] * number if sizes is None else sizes
    if len(shares) != number:
        msg = f"expected {number} relative sizes, one per site, got {len(shares)}"
        raise SettingsError(msg)
    counts = _counts(persons, shares)
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    parts = _deal(cases, counts, seed)
    return {f"site-{index}": part for index, part in enumerate(parts, start=1)}


def _title(path: Path) -> tuple[str, dict[int, str]]:
    file = path / DATASET
    if not file.is_file():
        return path.name, {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path.name}/{DATASET}: expected JSON, got an error: {error}"
        raise DataError(msg) from None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict) or not all(
        key.isdecimal() and isinstance(name, str) and name for key, name in labels.items()
    ):
        got = f"{labels!r:.80}"
        msg = f"{path.name}/{DATASET}: expected 'labels' as {{'1': 'name', ...}}, got {got}"
        raise DataError(msg)
    names = {int(key): name for key, name in labels.items() if int(key) != 0}
    return str(content.get("name", path.name)), dict(sorted(names.items()))


def _listed(path: Path, *, bundles: bool) -> Iterator[CaseRef]:
    needed = ["subject", "person", "site", *([] if bundles else ["image", "label"])]
    for line, row in _rows(path, needed):
        where = f"{path.name}/{PARTICIPANTS} line {line}"
        for column in needed:
            if not row[column] and column not in ("site", "label"):
                msg = f"{where}, column {column!r}: expected a value, got an empty cell"
                raise DataError(msg)
        subject, person, site = row["subject"], row["person"], row["site"]
        if bundles:
            bundle = _inside(path, subject + _BUNDLE, f"{where}, column 'subject'")
            yield CaseRef(subject, person, site, bundle, None)
            continue
        image = _inside(path, row["image"], f"{where}, column 'image'")
        label = row["label"] and _inside(path, row["label"], f"{where}, column 'label'")
        yield CaseRef(subject, person, site, image, label or None)


def _rows(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    file = path / PARTICIPANTS
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        msg = f"{path.name}/{PARTICIPANTS}: expected UTF-8 text; save it as CSV UTF-8"
        raise DataError(msg) from None
    first = text.partition("\n")[0]
    # spreadsheets of many countries separate by semicolon
    delimiter = ";" if ";" in first and "," not in first else ","
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter)
    missing = [column for column in needed if column not in (reader.fieldnames or ())]
    if missing:
        msg = f"{path.name}/{PARTICIPANTS}: expected columns {missing}, got {reader.fieldnames}"
        raise DataError(msg)
    for row in reader:
        yield reader.line_num, {column: (row[column] or "").strip() for column in needed}


def _inside(path: Path, value: str, where: str) -> Path:
    relative = PurePosixPath(value.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or ":" in value:
        msg = f"{where}: expected a path inside the folder, got {value!r}"
        raise DataError(msg)
    if not (path / relative).is_file():
        msg = f"{where}: no such file {value!r}"
        raise DataError(msg)
    return path / relative


def _unlisted_ref(path: Path, image: Path) -> CaseRef:
    stem = _stem(image)
    label = path / "labels" / image.name
    return CaseRef(stem, stem, "", image, label if label.is_file() else None)


def _images(path: Path) -> list[Path]:
    return _files(path / "images", _NIFTI)


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        return []
    found = (file for file in path.iterdir() if not file.name.startswith("."))
    return sorted(file for file in found if file.name.endswith(endings) and file.is_file())


def _stem(file: Path) -> str:
    name = file.name
    for ending in (*_NIFTI, _BUNDLE):
        name = name.removesuffix(ending)
    return name


def _refuse_repeats(path: Path, cases: Sequence[CaseRef]) -> None:
    for what in ("name", "image"):
        seen: set[object] = set()
        for case in cases:
            value = getattr(case, what)
            if value in seen:
                shown = value.name if isinstance(value, Path) else value
                msg = f"{path.name!r}: expected every case once, got {what} {shown!r} twice"
                raise DataError(msg)
            seen.add(value)


def _drawn_names(cases: Sequence[CaseRef]) -> list[str]:
    names: set[str] = set()
    for case in cases:
        try:
            names.update(bundle_labels(case.image))
        except DataError:
            continue  # reading the case itself gives the error, with its name
    return sorted(names)


def _counts(persons: int, shares: Sequence[float]) -> list[int]:
    """Share out persons by largest remainder; among equals the earlier part is served first."""
    parts = np.asarray(shares, dtype=np.float64)
    if not np.isfinite(parts).all() or (parts < 0).any() or not parts.sum() > 0:
        msg = f"expected shares of at least 0 and not all 0, got {list(shares)}"
        raise SettingsError(msg)
    quotas = persons * parts / parts.sum()
    counts = np.floor(quotas + 1e-9).astype(int)  # 0.7 of 10 is 7, however it is rounded
    left = persons - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:left]] += 1
    return [int(count) for count in counts]


def _deal(cases: Sequence[CaseRef], counts: Sequence[int], seed: int) -> list[list[CaseRef]]:
    persons = sorted({case.person for case in cases})
    shuffled = [persons[i] for i in np.random.default_rng(seed).permutation(len(persons))]
    ordered = sorted(cases, key=lambda case: case.name)
    parts, start = [], 0
    for count in counts:
        members = set(shuffled[start : start + count])
        parts.append([case for case in ordered if case.person in members])
        start += count
    return parts
