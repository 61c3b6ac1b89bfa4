"""Fine-tuning keeps the best state, goes on in the same bits, and leaves alone what waits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

pytest.importorskip("keras")

from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402 - needs keras
from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.errors import RunError  # noqa: E402
from dafne_federated.core.files import arrays_digest  # noqa: E402
from dafne_federated.core.fine_tuning import (  # noqa: E402
    FineTuned,
    FineTuning,
    fine_tune,
    plan_fine_tuning,
)
from dafne_federated.core.fine_tuning_folder import EpochLine, FineTuningFolder  # noqa: E402
from dafne_federated.core.fine_tuning_settings import FineTuningSettings  # noqa: E402
from dafne_federated.core.merged_model import adapted_model  # noqa: E402
from dafne_federated.core.model_file import read_model, write_model  # noqa: E402
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.core.preprocessing import BiasFieldCache  # noqa: E402
from dafne_federated.core.state import State  # noqa: E402
from dafne_federated.core.unfreezing import part_of  # noqa: E402

GRADUAL = FineTuningSettings(
    epochs=6, schedule="gradual", learning_rate=5e-3, rank=2, threads=2, device="cpu"
)


class StoppedError(Exception):
    """Stands for whatever ends a process between two epochs."""


@pytest.fixture(scope="module")
def tune(
    trained: Any, make_case: Callable[..., Any]
) -> Callable[..., tuple[FineTuning, FineTuned]]:
    """A function that fine-tunes in a network of its own, as a new process would."""
    bias_fields = BiasFieldCache()

    def pale(seed: int) -> Any:
        case = make_case(f"pale-{seed}", seed)
        return replace(case, image=(100 + (case.image - 100) * 0.35).astype(np.float32))

    def run(
        settings: FineTuningSettings,
        folder: FineTuningFolder | None = None,
        on_epoch: Callable[[EpochLine], None] | None = None,
        training: tuple[int, ...] = (50, 51),
        validation: tuple[int, ...] = (52,),
    ) -> tuple[FineTuning, FineTuned]:
        model = RunningModel(read_model(trained.path), trained.approvals)
        tuning = plan_fine_tuning(model, settings)
        slices = [
            model.prepare_all(map(pale, seeds), cache=bias_fields) if seeds else None
            for seeds in (training, validation)
        ]
        return tuning, fine_tune(tuning, slices[0], slices[1], folder, on_epoch)

    return run


@pytest.fixture(scope="module")
def gradual(tune: Any) -> tuple[FineTuning, FineTuned, list[EpochLine]]:
    told: list[EpochLine] = []
    return (*tune(GRADUAL, on_epoch=told.append), told)


def same_bits(one: State, other: State) -> bool:
    return arrays_digest(one) == arrays_digest(other)


def test_the_best_state_gains_and_each_epoch_is_told(gradual: Any) -> None:
    _, tuned, told = gradual
    lines = tuned.progress.lines
    assert told == lines
    assert [line.epoch for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.stage for line in lines] == ["head"] * 2 + ["decoder"] * 2 + ["all"] * 2
    assert [line.features for line in lines] == [True] * 4 + [False] * 2
    assert tuned.better
    assert tuned.dice == lines[tuned.epoch - 1].dice == max(line.dice for line in lines)
    assert tuned.dice > tuned.progress.base_dice


@pytest.mark.parametrize("after", [1, 2, 5])
def test_it_goes_on_in_the_same_bits_after_any_epoch(
    tune: Any, gradual: Any, tmp_path: Path, after: int
) -> None:
    def stop(line: EpochLine) -> None:
        if line.epoch == after:
            raise StoppedError

    folder = FineTuningFolder(tmp_path)
    with pytest.raises(StoppedError):
        tune(GRADUAL, folder, stop)
    told: list[EpochLine] = []
    _, tuned = tune(GRADUAL, folder, told.append)
    assert told[0].epoch == after + 1
    _, whole, _ = gradual
    assert same_bits(tuned.state, whole.state)
    assert same_bits(tuned.progress.state, whole.progress.state)
    assert [line.loss for line in tuned.progress.lines] == [
        line.loss for line in whole.progress.lines
    ]
    count = len(told)
    _, again = tune(GRADUAL, folder, told.append)
    assert len(told) == count  # all epochs are done, so none is trained again
    assert same_bits(again.state, whole.state)


def test_early_stages_leave_all_else_as_it_was(tune: Any, tmp_path: Path) -> None:
    folder = FineTuningFolder(tmp_path)
    states: list[State] = []
    tuning, _ = tune(GRADUAL, folder, lambda _: states.append(folder.progress().state))
    base, plan = tuning.model.file, tuning.plan
    for state, epoch in zip(states, range(6), strict=True):
        stage = tuning.stages[epoch // 2].plan
        trained = {target.key for target in stage.targets}
        folded = adapted_model(base, plan, state, 1).weights
        changed = {k for k in base.weights if not np.array_equal(base.weights[k], folded[k])}
        assert changed == trained


def test_a_state_of_a_stage_is_one_of_the_whole_plan(
    tune: Any, trained: Any, make_case: Any
) -> None:
    tuning, tuned = tune(GRADUAL.model_copy(update={"epochs": 3}))
    head = tuning.stages[0].plan
    state = tuning.start | part_of(tuned.state, head)
    outputs = []
    inputs = np.random.default_rng(0).normal(size=(2, 40, 40, 2)).astype(np.float32)
    for plan, own in ((head, part_of(state, head)), (tuning.plan, state)):
        model = RunningModel(read_model(trained.path), trained.approvals)
        adapted = AdaptedNetwork(model.network, plan)
        adapted.write(own)
        outputs.append(adapted.predict(inputs))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)


def test_the_folded_model_computes_what_was_validated(gradual: Any, tmp_path: Path) -> None:
    tuning, tuned, _ = gradual
    written = write_model(
        adapted_model(tuning.model.file, tuning.plan, tuned.state, 1), tmp_path / "new.model"
    )
    approvals = Approvals(tmp_path / "own.json")
    approvals.add(written, "made by a test")
    plain = RunningModel(written, approvals).network
    adapted = AdaptedNetwork(tuning.model.network, tuning.plan)
    adapted.write(tuned.state)
    inputs = np.random.default_rng(0).normal(100, 30, size=(2, 40, 40, 2)).astype(np.float32)
    after = np.asarray(plain.predict_on_batch(inputs))
    np.testing.assert_allclose(after, adapted.predict(inputs), atol=1e-5)
    adapted.write(tuning.start)
    assert np.abs(after - adapted.predict(inputs)).max() > 0.01


def test_statistics_are_set_once_and_hold_in_all_stages(
    tune: Any, gradual: Any, trained: Any, tmp_path: Path
) -> None:
    settings = GRADUAL.model_copy(update={"statistics": "pooled"})

    def stop(line: EpochLine) -> None:
        if line.epoch == 3:
            raise StoppedError

    folder = FineTuningFolder(tmp_path)
    with pytest.raises(StoppedError):
        tune(settings, folder, stop)
    halfway = folder.progress().state
    _, resumed = tune(settings, folder)
    tuning, whole = tune(settings)
    assert same_bits(resumed.state, whole.state)
    set_once = tuning.plan.state_shapes(trained=False)
    assert len(set_once) == 2 * len(tuning.plan.normalisations) > 0
    for key in set_once:
        np.testing.assert_array_equal(halfway[key], whole.state[key])
    assert any(np.abs(whole.state[key]).max() > 1e-3 for key in set_once)
    # The gate compares with the base as it is, not with the one that was mended.
    assert whole.progress.base_dice == pytest.approx(gradual[1].progress.base_dice, abs=1e-3)
    folded = adapted_model(tuning.model.file, tuning.plan, whole.state, 1)
    own = RunningModel(read_model(trained.path), trained.approvals)
    own.network.set_weights([folded.weights[key] for key in sorted(folded.weights)])
    adapted = AdaptedNetwork(tuning.model.network, tuning.plan)  # it holds the base again
    adapted.write(whole.state)
    inputs = np.random.default_rng(0).normal(100, 30, size=(2, 40, 40, 2)).astype(np.float32)
    after = np.asarray(own.network.predict_on_batch(inputs))
    np.testing.assert_allclose(after, adapted.predict(inputs), atol=1e-5)


def test_convolutions_in_bfloat16_end_nearby(tune: Any, gradual: Any) -> None:
    _, tuned = tune(GRADUAL.model_copy(update={"precision": "bfloat16"}))
    assert not same_bits(tuned.state, gradual[1].state)
    assert tuned.dice == pytest.approx(gradual[1].dice, abs=0.05)


def test_without_validation_slices_the_last_epoch_counts(tune: Any) -> None:
    settings = FineTuningSettings(epochs=3, patience=1, layers="decoder", device="cpu", threads=2)
    _, tuned = tune(settings, validation=())
    assert tuned.better
    assert tuned.epoch == len(tuned.progress.lines) == 3
    assert tuned.dice is tuned.progress.base_dice is None
    assert same_bits(tuned.state, tuned.progress.state)
    assert "nobody to validate on" in tuned.reason


def test_what_is_not_better_stays_behind_the_gate_and_ends_early(tune: Any) -> None:
    """With a scale this large the first step throws the network off its task."""
    settings = FineTuningSettings(
        epochs=9, patience=2, learning_rate=1.0, scale=50.0, device="cpu", threads=2
    )
    tuning, tuned = tune(settings)
    assert len(tuned.progress.lines) == 2
    assert max(line.dice for line in tuned.progress.lines) < tuned.progress.base_dice
    assert not tuned.better
    assert tuned.epoch == 0
    assert same_bits(tuned.state, tuning.start)
    assert "no epoch has a validation Dice above that of the base" in tuned.reason
    _, forced = tune(settings.model_copy(update={"gate": "none"}))
    assert forced.better
    assert forced.epoch == 2
    assert same_bits(forced.state, tuned.progress.state)


def test_other_images_do_not_go_on_with_a_run(tune: Any, tmp_path: Path) -> None:
    settings = FineTuningSettings(epochs=1, method="head", device="cpu", threads=2)
    tune(settings, FineTuningFolder(tmp_path))
    with pytest.raises(RunError, match="not those that the run began with"):
        tune(settings, FineTuningFolder(tmp_path), training=(50, 53))
