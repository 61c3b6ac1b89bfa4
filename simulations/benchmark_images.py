"""The images of a benchmark as its run uses them: thinned, and with other masks where asked.

images/   all persons
base/     the same with the labels of the base, where these differ
wrong/    the same with each label named as the next one, where a site is to be wrong
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dafne_federated.core.dataset import (
    DATASET,
    PARTICIPANTS,
    DataFolder,
    label_names,
    load_case,
    open_folder,
)
from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.volumes import Case, write_nifti_pair
from dafne_federated.simulations.benchmark_scenario import PHANTOMS, Scenario
from dafne_federated.simulations.phantoms import write_phantoms

Change = Callable[[Case], Case]


def source_folder(scenario: Scenario, data: Path | None) -> Path | None:
    """Return where the images of a scenario come from; None for phantom limbs.

    Args:
        scenario: The scenario.
        data: The folder itself, or the one that holds it by its name.

    Raises:
        SettingsError: It is needed and not given.
    """
    if scenario.data == PHANTOMS:
        return None
    if data is None:
        msg = f"this scenario needs the images {scenario.data!r}: give their folder with --data"
        raise SettingsError(msg)
    inside = data / scenario.data
    return inside if inside.is_dir() else data


def write_images(scenario: Scenario, source: Path | None, folder: Path) -> None:
    """Write the images of a scenario into ``folder``; what is there whole already stays.

    Raises:
        DataError: A case has no masks, or something is damaged.
        SettingsError: The scenario names labels that the data does not have.
    """
    if source is None:
        original = folder / "phantoms"
        if not (original / PARTICIPANTS).exists():
            write_phantoms(original, scenario.persons.phantoms, scenario.division)
        source = original
    images = open_folder(source)
    labels = list(images.labels.values())
    nth, merged = scenario.every_nth_slice, scenario.network.base_labels
    _write(images, folder / "images", labels, lambda case: thinned(case, nth))
    if merged:
        if unknown := sorted({one for own in merged.values() for one in own} - set(labels)):
            msg = f"base-labels: expected labels of the data, {sorted(labels)}, got {unknown[0]!r}"
            raise SettingsError(msg)
        _write(
            images,
            folder / "base",
            list(merged),
            lambda case: with_merged_labels(thinned(case, nth), merged),
        )
    if scenario.sites.wrong_labels:
        _write(
            images,
            folder / "wrong",
            labels,
            lambda case: with_next_names(thinned(case, nth), labels),
        )


def thinned(case: Case, nth: int) -> Case:
    """Return a case with every so manieth slice, the first among them."""
    if nth == 1:
        return case
    affine = None
    if case.affine is not None:
        affine = case.affine @ np.diag([1.0, 1.0, float(nth), 1.0])
    return replace(
        case,
        image=np.ascontiguousarray(case.image[..., ::nth]),
        masks={name: mask[..., ::nth] for name, mask in case.masks.items()},
        spacing=(*case.spacing[:2], case.spacing[2] * nth),
        affine=affine,
    )


def with_merged_labels(case: Case, merged: Mapping[str, tuple[str, ...]]) -> Case:
    """Return a case whose labels are unions of its own, by the new name."""
    masks = {name: np.any([case.masks[one] for one in own], axis=0) for name, own in merged.items()}
    return replace(case, masks=masks)


def with_next_names(case: Case, labels: list[str]) -> Case:
    """Return a case on which each label bears the name of the next one, the last of the first."""
    following = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    return replace(case, masks={following[name]: mask for name, mask in case.masks.items()})


def _write(images: DataFolder, path: Path, labels: list[str], change: Change) -> None:
    if (path / PARTICIPANTS).exists():
        return
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["subject", "image", "label", "person", "site"])
    numbers = dict(enumerate(labels, start=1))
    for ref in images.cases:
        if not label_names(ref, images):
            msg = f"case {ref.name!r}: expected a label map or masks, got none; leave it out"
            raise DataError(msg)
        image, label = (f"{part}/{ref.name}.nii.gz" for part in ("images", "labels"))
        case = change(load_case(ref, images.labels))
        write_nifti_pair(case, path / image, path / label, numbers)
        rows.writerow([ref.name, image, label, ref.person, ref.site])
    title = {"name": images.name, "labels": {str(k): v for k, v in numbers.items()}}
    write_atomic(path / DATASET, json.dumps(title, indent=1).encode())
    write_atomic(path / PARTICIPANTS, table.getvalue().encode())  # last: it makes it whole
