"""A fine-tuned model has the labels of its base, unless the data or a person has others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.bundles import write_bundle
from dafne_federated.core.dataset import DataFolder, open_folder
from dafne_federated.core.errors import DataError, RunError, SettingsError
from dafne_federated.core.fine_tuning_folder import FineTuningFolder
from dafne_federated.core.function_sources import NetworkSpec
from dafne_federated.core.model_file import ModelFile, model_labels
from dafne_federated.core.volumes import Case
from dafne_federated.simulations.fine_tuning_labels import (
    base_for,
    check_labels,
    choose_labels,
    own_labels,
)


@pytest.fixture(scope="module")
def given() -> ModelFile:
    import numpy as np

    spec = NetworkSpec(
        labels=("bright", "dark"), size=16, resolution=(1, 1), filters=(4, 6), strides=(2,)
    )
    weights = {"0000": np.zeros((1, 1, 4, 3), np.float32), "0001": np.zeros(3, np.float32)}
    return ModelFile(
        digest="a" * 64,
        model_id="x",
        timestamp_id=1,
        type="DynamicDLModel",
        dimensionality=2,
        is_delta=False,
        metadata={},
        functions=dict(spec.sources()),
        kind="keras",
        weights=weights,
    )


def data_with(path: Path, squares: Path, labels: dict[str, str]) -> DataFolder:
    path.mkdir()
    for name in ("images", "labels", "participants.csv"):
        (path / name).symlink_to(squares / name)
    (path / "dataset.json").write_text(json.dumps({"labels": labels}))
    return open_folder(path)


def test_the_models_own_labels_need_no_new_layer(given: ModelFile, squares_folder: Path) -> None:
    data = open_folder(squares_folder)
    for wanted in (None, "base", "bright, dark"):
        choice = choose_labels(given, data, data.cases, wanted)
        assert (choice.labels, choice.note) == (None, "")


def test_sides_are_no_labels_of_their_own(
    given: ModelFile, tmp_path: Path, squares_folder: Path
) -> None:
    data = data_with(tmp_path / "d", squares_folder, {"1": "bright_L", "2": "bright_R"})
    assert choose_labels(given, data, data.cases, None).labels is None
    check_labels(own_labels(given), data.cases, data)


def test_labels_that_the_model_lacks_are_taken_and_said(
    given: ModelFile, tmp_path: Path, squares_folder: Path
) -> None:
    data = data_with(tmp_path / "d", squares_folder, {"1": "bright", "2": "bone"})
    choice = choose_labels(given, data, data.cases, None)
    assert choice.labels == ("bright", "bone")
    assert "the data has 'bone', which the model does not know" in choice.note
    assert "--labels base" in choice.note
    assert choose_labels(given, data, data.cases, "base").labels is None
    assert choose_labels(given, data, data.cases, "bone").labels == ("bone",)
    with pytest.raises(SettingsError, match=r"expected names of the data, .*, got 'dark'"):
        choose_labels(given, data, data.cases, "bone,dark")


def test_cases_without_a_label_of_the_model_are_refused_by_name(
    given: ModelFile, tmp_path: Path, squares_folder: Path
) -> None:
    data = data_with(tmp_path / "d", squares_folder, {"1": "tibia", "2": "bone"})
    with pytest.raises(DataError, match=r"'clinic-0': expected labels of the model.*'tibia'"):
        check_labels(own_labels(given), data.cases, data)


def test_a_base_with_a_new_layer_is_made_once_and_approved(
    given: ModelFile, tmp_path: Path
) -> None:
    folder, approvals = FineTuningFolder(tmp_path), Approvals(tmp_path / "approved.json")
    assert base_for(given, None, 1, folder, approvals) is given
    base = base_for(given, ("bone", "bright"), 1, folder, approvals)
    assert model_labels(base) == {1: "bone", 2: "bright"}
    assert approvals.allows(base.digest)
    assert base_for(given, ("bone", "bright"), 1, folder, approvals).digest == base.digest
    assert base_for(given, None, 1, folder, approvals) is given  # nothing was begun with it
    assert model_labels(base_for(given, ("bone",), 1, folder, approvals)) == {1: "bone"}
    (folder.path / "run.json").touch()
    assert model_labels(base_for(given, ("bone",), 1, folder, approvals)) == {1: "bone"}
    for labels, seed in ((("bone", "bright"), 1), (("bone",), 2)):
        with pytest.raises(RunError, match="other labels, another model or seed"):
            base_for(given, labels, seed, folder, approvals)
    folder.base.unlink()
    with pytest.raises(RunError, match="other labels, another model or seed"):
        base_for(given, ("bone",), 1, folder, approvals)


def test_only_the_cases_that_are_used_say_which_labels_there_are(
    given: ModelFile, tmp_path: Path, make_case: Callable[..., Case]
) -> None:
    for name, labels in (("ours", ("bright", "dark")), ("theirs", ("bright", "roi"))):
        case = make_case(name, 1, slices=1)
        masks = dict(zip(labels, case.masks.values(), strict=True))
        write_bundle(replace(case, masks=masks), tmp_path / f"{name}.npz")
    data = open_folder(tmp_path)
    assert choose_labels(given, data, data.cases, None).labels == ("bright", "dark", "roi")
    ours = [case for case in data.cases if case.name == "ours"]
    assert choose_labels(given, data, ours, None).labels is None
