"""The coordinator's own images are measured at any rank, and must have the model's labels."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DataError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.low_rank import widen
from dafne_federated.core.model_file import read_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.new_run import make_plan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, initial_state
from dafne_federated.server.continuation import Absent, Continuation, keep_continuation
from dafne_federated.server.reference_folder import reference_changes

pytestmark = pytest.mark.slow


@pytest.fixture
def version(tmp_path: Path, trained: Any, squares_folder: Path, own_home: Path) -> RunFolder:
    """A version whose only round widened the state that it started from, and did no more."""
    Approvals().add(read_model(trained.path), "test")
    reference = tmp_path / "reference"
    shutil.copytree(squares_folder, reference)
    settings = RunSettings(rank=2, max_rank=4, threads=2, device="cpu", reference=str(reference))
    plan = make_plan(RunningModel(read_model(trained.path), trained.approvals), settings)
    info = RunInfo(
        run="0" * 32, created=1, base_digest=plan.base_digest, base_name="Squares",
        plan_digest=plan.digest, settings=settings, versions={}, command="",
    )  # fmt: skip
    folder = RunFolder.create(tmp_path / "version", info, plan, trained.path.read_bytes())
    generator = np.random.default_rng(1)
    start: State = {
        name: generator.normal(0, 0.2, values.shape).astype(np.float32)
        for name, values in initial_state(plan, 0).items()
    }
    record = Continuation(
        version=2,
        start_digest=arrays_digest(start),
        new_cases={},
        contained={"clinic": Absent(cases=3, behind=1)},
    )
    keep_continuation(folder, record, start)
    wide = dict(start)
    for target in plan.targets:
        if target.low_rank:
            names = (f"{target.key}/a", f"{target.key}/b")
            wide |= zip(names, widen((start[names[0]], start[names[1]]), 4), strict=True)
    assert any(wide[name].shape != start[name].shape for name in start)
    line = RoundLine(
        round=1, trained=True, sites={}, aggregation_error=None,
        state_digest=arrays_digest(wide), seconds=1.0,
    )  # fmt: skip
    folder.finish_round(line, wide)
    return folder


def test_a_state_of_another_rank_is_compared_with_the_start_and_the_base(
    version: RunFolder,
) -> None:
    start, base = reference_changes(version)(1)
    assert start.keys() == base.keys() == {"bright", "dark"}
    assert {change.persons for found in (start, base) for change in found.values()} == {8}
    for change in start.values():
        assert change.total == pytest.approx(0, abs=1e-3)
    (version.path / "continues.json").unlink()  # as a run that started from the base
    (alone,) = reference_changes(version)(1)
    assert alone == base
    assert any(abs(change.total) > 0.01 for change in base.values())


def test_masks_of_other_labels_only_are_refused(version: RunFolder) -> None:
    path = Path(version.info().settings.reference) / "dataset.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(told | {"labels": {"1": "liver", "2": "spleen"}}))
    with pytest.raises(DataError, match="expected masks of bright, dark, got none of them"):
        reference_changes(version)(1)
