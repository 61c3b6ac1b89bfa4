"""What is kept of a fine-tuning comes back as it was, and only the same run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.errors import RunError
from dafne_federated.core.fine_tuning_folder import (
    EpochLine,
    FineTuningFolder,
    FineTuningInfo,
    Progress,
)
from dafne_federated.core.fine_tuning_settings import FineTuningSettings
from dafne_federated.core.plan import AdaptationPlan


def info_of(plan: AdaptationPlan, **changes: Any) -> FineTuningInfo:
    values: dict[str, Any] = {
        "run": "0" * 32,
        "created": 1,
        "base_name": "Base",
        "base_digest": "b" * 64,
        "given_digest": "b" * 64,
        "base_parameters": 10,
        "plan_digest": plan.digest,
        "settings": FineTuningSettings(),
        "classification": "",
        "cases": {"training": ("x",), "validation": ("y",), "test": ()},
        "persons": {"training": 1, "validation": 1, "test": 0},
        "versions": {},
        "command": "finetune",
    }
    return FineTuningInfo(**values | changes)


def progress_of(make_state: Any, epochs: int) -> Progress:
    lines = [
        EpochLine(
            epoch=epoch,
            stage="all",
            parameters=3,
            features=True,
            learning_rate=0.1,
            loss=1.5,
            dice=0.5,
            best=epoch == 1,
            seconds=0.1,
        )
        for epoch in range(1, epochs + 1)
    ]
    optimiser = {"0000": np.array(7, np.int64), "0001": np.arange(3, dtype=np.float32)}
    return Progress("d" * 64, (4, 2), 0.4, lines, make_state(1), make_state(2), optimiser)


def test_progress_comes_back_as_it_was(tmp_path: Path, make_state: Any) -> None:
    folder = FineTuningFolder(tmp_path / "run")
    assert folder.progress() is None
    for epochs in (1, 2):
        kept = progress_of(make_state, epochs)
        folder.keep(kept)
    found = folder.progress()
    assert found is not None
    assert (found.slices_digest, found.slices, found.base_dice) == ("d" * 64, (4, 2), 0.4)
    assert found.lines == kept.lines
    for name in ("state", "best", "optimiser"):
        ours, theirs = getattr(kept, name), getattr(found, name)
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            assert array.dtype == theirs[key].dtype
            np.testing.assert_array_equal(array, theirs[key])
    assert (folder.path / "epochs.jsonl").read_text().count("\n") == 2


def test_a_damaged_checkpoint_is_one_error(tmp_path: Path, make_state: Any) -> None:
    folder = FineTuningFolder(tmp_path / "run")
    folder.keep(progress_of(make_state, 1))
    file = folder.path / "checkpoint.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(RunError, match=r"checkpoint\.npz: damaged"):
        folder.progress()


def test_the_same_run_goes_on_with_its_first_record(
    tmp_path: Path, small_plan: AdaptationPlan
) -> None:
    folder = FineTuningFolder(tmp_path / "run")
    first = folder.begin(info_of(small_plan), small_plan)
    assert folder.begin(info_of(small_plan, run="1" * 32, created=2), small_plan) == first
    assert folder.info() == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": FineTuningSettings(epochs=3)}, "started with epochs 40, got 3; choose"),
        ({"settings": FineTuningSettings(rank=2)}, "started with rank 4, got 2"),
        ({"given_digest": "c" * 64}, "started with model"),
        ({"classification": "Leg"}, 'started with classification "", got "Leg"'),
        (
            {"cases": {"training": ("x", "z"), "validation": ("y",), "test": ()}},
            r'started with training cases \["x"\], got \["x", "z"\]',
        ),
    ],
)
def test_another_run_is_refused_by_what_differs(
    tmp_path: Path, small_plan: AdaptationPlan, changes: dict[str, Any], words: str
) -> None:
    folder = FineTuningFolder(tmp_path / "run")
    folder.begin(info_of(small_plan), small_plan)
    with pytest.raises(RunError, match=words):
        folder.begin(info_of(small_plan, **changes), small_plan)


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    with (
        FineTuningFolder(tmp_path).lock(),
        pytest.raises(RunError, match="another process is working"),
        FineTuningFolder(tmp_path).lock(),
    ):
        pass
    with FineTuningFolder(tmp_path).lock():
        pass


def test_features_and_corrected_images_do_not_stay(tmp_path: Path) -> None:
    folder = FineTuningFolder(tmp_path)
    for path in (folder.features, folder.bias_fields):
        path.mkdir()
        (path / "image").touch()
    folder.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "project" / "features" / "radiomics.csv"
    precious.parent.mkdir(parents=True)
    precious.write_text("case,volume")
    mode = precious.parent.parent.stat().st_mode
    with pytest.raises(RunError, match="one that holds other files; choose another --run"):
        FineTuningFolder(tmp_path / "project")
    assert precious.parent.parent.stat().st_mode == mode
    assert precious.read_text() == "case,volume"
