"""Who is trained on, and who is not."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

pytest.importorskip("keras")

from dafne_federated.core.dataset import open_folder  # noqa: E402 - needs keras
from dafne_federated.core.errors import SettingsError  # noqa: E402
from dafne_federated.core.fine_tuning_settings import FineTuningSettings  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.simulations.fine_tuning_run import FineTuningJob  # noqa: E402


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
