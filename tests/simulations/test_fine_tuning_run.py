"""Who is trained on, and who is not."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

pytest.importorskip("keras")

from dafne_federated.core.approvals import Approvals  # noqa: E402 - needs keras
from dafne_federated.core.dataset import load_case, open_folder  # noqa: E402
from dafne_federated.core.errors import SettingsError  # noqa: E402
from dafne_federated.core.evaluation import evaluate_case  # noqa: E402
from dafne_federated.core.fine_tuning_settings import FineTuningSettings  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.simulations.fine_tuning_labels import choose_labels  # noqa: E402
from dafne_federated.simulations.fine_tuning_run import (  # noqa: E402
    FineTuningJob,
    run_fine_tuning,
)
from dafne_federated.simulations.progress import Stages  # noqa: E402


@pytest.mark.parametrize(("persons", "shares"), [(1, (1, 2, 1)), (2, (1, 10, 10)), (3, (1, 5, 5))])
def test_without_a_training_person_nothing_is_trained(
    trained: Any, squares_folder: Path, tmp_path: Path, persons: int, shares: tuple[int, ...]
) -> None:
    data = open_folder(squares_folder)

    def job(*dealt: float) -> FineTuningJob:
        return FineTuningJob(
            given=read_model(trained.path),
            labels=None,
            data=data,
            cases=data.cases[:persons],
            output=tmp_path / "new.model",
            run=tmp_path / "new.run",
            settings=FineTuningSettings(),
            shares=dealt,
        )

    assert len(job(2, 1, 1).parts()["training"]) >= 1
    with pytest.raises(SettingsError, match=f"got nobody of {persons} persons; give training a"):
        job(*shares).parts()


def test_a_label_that_the_data_does_not_name_is_not_unlearned(
    trained: Any, squares_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "labels", "participants.csv"):
        (data / name).symlink_to(squares_folder / name)
    (data / "dataset.json").write_text('{"labels": {"1": "bright", "2": "bone"}}')
    Approvals().add(read_model(trained.path), "test")
    given = read_model(trained.path)
    folder = open_folder(data)
    choice = choose_labels(given, folder, folder.cases, "base")
    assert choice.labels is None
    assert "does not name 'dark' of the model, so nothing is learned of it" in choice.note
    job = FineTuningJob(
        given=given,
        labels=None,
        data=folder,
        cases=folder.cases,
        output=tmp_path / "new.model",
        run=tmp_path / "new.run",
        settings=FineTuningSettings(epochs=6, gate="none", threads=2, device="cpu"),
        shares=(3, 1, 0),
    )
    with Stages(quiet=True) as stages:
        outcome = run_fine_tuning(job, stages)
    assert outcome.result.dice is not None
    assert outcome.result.base_dice is not None
    assert outcome.result.dice > outcome.result.base_dice
    new = RunningModel(read_model(job.output), Approvals())
    told = new.file.metadata["federated"]
    assert told["labels_not_annotated"] == ["dark"]
    base = RunningModel(given, Approvals())
    real = open_folder(squares_folder)
    case = load_case(real.cases[0], real.labels)
    after, before = (
        {row.label: row.dice for row in evaluate_case(model, case, distances=False)}
        for model in (new, base)
    )
    assert after["dark"] > before["dark"] - 0.1
