"""What is wrong with a data folder, in words for the person who drew the masks."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dafne_federated.core.case_check import (
    check_case,
    drawn_labels,
    labelled_slices,
    labels_needed,
    read_for_check,
    usable_slices,
)
from dafne_federated.core.dataset import CaseRef, DataFolder, files_left_out
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.findings import LEAST_SLICES, Finding, ModelExpectation, enumerated
from dafne_federated.core.label_check import check_absent
from dafne_federated.core.site_labels import SiteLabels
from dafne_federated.core.volumes import DAFNE_ORIENTATION, Case, orientation


def check_folder(
    folder: DataFolder,
    expected: ModelExpectation | None,
    splits: Mapping[str, Sequence[CaseRef]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    here: SiteLabels | None = None,
) -> list[Finding]:
    """Look at every case of a folder, and at all of them together.

    A case that cannot be read is a finding; the check goes on with the next one.

    Args:
        folder: What to check.
        expected: What the model needs that shall be trained; None checks the data alone.
        splits: Parts that must not share a person, by name.
        progress: Called with cases done and all cases, after each case.
        here: What the site calls the labels of the model, and which of them it annotated.

    Returns:
        Findings: those about the whole folder first, then by case.
    """
    labels = tuple(dict.fromkeys(folder.labels.values()))
    if expected is not None and expected.labels:
        labels = expected.labels
    least = None if expected is None else expected.least_labels
    by_case: list[Finding] = []
    known: set[str] = set()
    seen: list[_Seen] = []
    for done, ref in enumerate(folder.cases, start=1):
        case, found = read_for_check(ref, folder.labels)
        by_case += found
        if case is not None:
            known |= case.masks.keys()
            case = case if here is None else here.case(case)
            by_case += check_case(case, labels, expected)
            seen.append(_remember(case, labels, least))
        if progress is not None:
            progress(done, len(folder.cases))
    together = [
        *_check_splits(splits or {}),
        *_check_duplicates(seen),
        *_check_sites(folder.cases),
        *_check_slices(seen, labels, expected),
        *check_absent(labels, known, {name for case in seen for name in case.drawn}, here),
        *_check_directions(seen, expected),
        *_check_left_out(folder),
        *_check_model(expected),
    ]
    return together + by_case


@dataclass(frozen=True)
class _Seen:
    """What is kept of a case for the checks over all of them."""

    name: str
    person: str
    digest: str
    direction: str
    drawn: set[str]
    labelled: int
    usable: int


def _remember(case: Case, labels: Sequence[str], least: int | None) -> _Seen:
    return _Seen(
        name=case.name,
        person=case.person,
        digest=arrays_digest({"image": case.image}),
        direction="" if case.affine is None else orientation(case.affine),
        drawn=drawn_labels(case, labels),
        labelled=int(np.count_nonzero(labelled_slices(case))),
        usable=int(np.count_nonzero(usable_slices(case, labels, least))),
    )


def _check_splits(splits: Mapping[str, Sequence[CaseRef]]) -> Iterator[Finding]:
    parts: dict[str, list[str]] = defaultdict(list)
    for part, cases in splits.items():
        for person in sorted({case.person for case in cases}):
            parts[person].append(part)
    for person, names in sorted(parts.items()):
        if len(names) > 1:
            what = f"The person {person!r} is in more than one part: {enumerated(names)}."
            advice = "Put all images of a person into one part, or the result looks too good."
            yield Finding("error", "", what, advice)


def _check_duplicates(seen: Sequence[_Seen]) -> Iterator[Finding]:
    first: dict[str, _Seen] = {}
    for case in seen:
        other = first.setdefault(case.digest, case)
        if other is case:
            continue
        if other.person == case.person:
            what = f"The image is the same as that of case {other.name!r}."
            yield Finding("warning", case.name, what, "Take one of the two out.")
        else:
            what = (
                f"The image is the same as that of case {other.name!r}, "
                f"yet the two are listed as different persons."
            )
            advice = "Take one of the two out, or correct who was scanned."
            yield Finding("error", case.name, what, advice)


def _check_sites(cases: Sequence[CaseRef]) -> Iterator[Finding]:
    sites: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        sites[case.person].add(case.site)
    for person, names in sorted(sites.items()):
        if len(names) > 1:
            listed = enumerated(sorted(name or "no site" for name in names))
            what = f"The person {person!r} is listed at more than one site: {listed}."
            advice = "Do not test on this person at one site what another site trained on."
            yield Finding("warning", "", what, advice)


def _check_slices(
    seen: Sequence[_Seen], labels: Sequence[str], expected: ModelExpectation | None
) -> Iterator[Finding]:
    least = LEAST_SLICES if expected is None else expected.least_slices
    advice = labels_needed(labels, None if expected is None else expected.least_labels)
    usable, labelled = (
        sum(getattr(case, what) for case in seen) for what in ("usable", "labelled")
    )
    if usable < least:
        what = f"Dafne can learn from {usable} slices of this folder and needs at least {least}."
        yield Finding("error", "", what, advice)
    elif usable < labelled:
        what = f"Dafne will skip {labelled - usable} of the {labelled} slices with labels."
        yield Finding("note", "", what, advice)


def _check_directions(
    seen: Sequence[_Seen], expected: ModelExpectation | None
) -> Iterator[Finding]:
    count = Counter(case.direction for case in seen if case.direction)
    if not count:
        return
    ((usual, _),) = count.most_common(1)
    others = [case.name for case in seen if case.direction not in ("", usual)]
    if others:
        what = (
            f"The images are not all stored the same way round: most run towards {_towards(usual)},"
            f" but not {enumerated(others)}."
        )
        advice = "Store all images the same way round: a mirrored one swaps left and right."
        yield Finding("warning", "", what, advice)
    shown = DAFNE_ORIENTATION.get(expected.plane, "") if expected is not None else ""
    if shown and usual != shown and set(usual[2]) <= set(_axis(shown[2])):
        what = (
            f"Rows, columns and slices run towards {_towards(usual)}; "
            f"Dafne's own programs show them towards {_towards(shown)}."
        )
        advice = "Right for a model that was made from data stored like these."
        yield Finding("note", "", what, advice)


def _check_left_out(folder: DataFolder) -> Iterator[Finding]:
    names = files_left_out(folder)
    if names:
        what = f"Images that participants.csv does not list: {enumerated(names)}."
        yield Finding("note", "", what, "They are not used; add a line for each to use them.")


def _check_model(expected: ModelExpectation | None) -> Iterator[Finding]:
    if expected is None:
        return
    unknown = [
        name
        for name, value in {
            "label names": expected.labels,
            "plane": expected.plane,
            "pixel size": expected.spacing,
            "image size": expected.size,
        }.items()
        if not value
    ]
    if unknown:
        what = f"The model file does not plainly state its {enumerated(unknown)}."
        yield Finding("note", "", what, "This was not checked; compare it with an image yourself.")


def _axis(letter: str) -> str:
    return next(axis for axis in ("LR", "AP", "SI") if letter in axis)


def _towards(directions: str) -> str:
    words = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
    return ", ".join(words[letter] for letter in directions)
