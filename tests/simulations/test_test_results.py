"""Test results survive a run folder unchanged; damage and contradictions are named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dafne_federated.core.errors import RunError
from dafne_federated.core.metrics import agreement
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.simulations.test_results import (
    Overlay,
    TestRow,
    load_overlays,
    load_test_rows,
    save_overlays,
    save_test_rows,
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = [_row(0.5, 3.25, -10.0), _row(None, None, None), _row(0.0, None, -100.0)]
    save_test_rows(folder, rows)
    assert load_test_rows(folder) == rows


def test_a_folder_without_tests_has_no_rows_and_no_overlays(tmp_path: Path) -> None:
    assert load_test_rows(RunFolder(tmp_path)) == []
    assert load_overlays(RunFolder(tmp_path)) == []


def test_every_measured_agreement_is_a_row() -> None:
    full, empty = np.ones((4, 4, 2), bool), np.zeros((4, 4, 2), bool)
    masks = {"both": full, "missed": full, "invented": empty, "neither": empty}
    drawn = {"both": full, "missed": empty, "invented": full, "neither": empty}
    found = agreement("c", masks, drawn, (1.0, 1.0, 1.0), distances=False)
    rows = {r.label: _row(r.dice, r.hd95, r.volume_error) for r in found}
    assert rows["both"].dice == 1
    assert (rows["missed"].dice, rows["missed"].volume_error) == (0, -100)
    assert (rows["invented"].dice, rows["invented"].volume_error) == (0, None)
    assert (rows["neither"].dice, rows["neither"].volume_error) == (None, None)


@pytest.mark.parametrize(
    ("dice", "hd95", "volume_error"), [(None, None, 3.0), (0.5, None, None), (0.0, 2.0, None)]
)
def test_a_row_cannot_contradict_itself(
    dice: float | None, hd95: float | None, volume_error: float | None
) -> None:
    with pytest.raises(ValidationError, match="expected a Dice with, and no overlap"):
        _row(dice, hd95, volume_error)


@pytest.mark.parametrize("dice", [-0.1, 1.5, float("nan")])
def test_a_dice_lies_between_0_and_1(dice: float) -> None:
    with pytest.raises(ValidationError):
        _row(dice, None, 0.0)


def test_only_known_arms_have_rows() -> None:
    with pytest.raises(ValidationError, match="arm"):
        TestRow(
            arm="best", site="s", person="p", case="c", label="l", dice=1, hd95=0, volume_error=0
        )


@pytest.mark.parametrize(
    "text", ["{", '{"rows": [{"arm": "base"}]}', '{"rows": [], "more": 1}', "[]"]
)
def test_damaged_rows_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(RunError, match=r"test\.json"):
        load_test_rows(RunFolder(tmp_path))


def test_overlays_come_back_as_they_were_in_their_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    overlays = [replace(_overlay(), slice_index=index) for index in range(11)]
    save_overlays(folder, overlays)
    found = load_overlays(folder)
    assert [overlay.slice_index for overlay in found] == list(range(11))
    for overlay, original in zip(found, overlays, strict=True):
        assert overlay.person == original.person
        assert overlay.orientation == "RA"
        np.testing.assert_array_equal(overlay.image, original.image)
        np.testing.assert_array_equal(overlay.truth, original.truth)
        np.testing.assert_array_equal(overlay.spacing, original.spacing)
        assert overlay.predictions.keys() == original.predictions.keys()
        for arm, mask in overlay.predictions.items():
            np.testing.assert_array_equal(mask, original.predictions[arm])


def test_overlays_replace_earlier_ones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_overlays(folder, [_overlay()] * 3)
    save_overlays(folder, [_overlay()])
    assert len(load_overlays(folder)) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"truth": np.zeros((3, 5), np.uint8)}, "truth: expected .*4, 5.* uint8, got .*3, 5"),
        ({"image": np.zeros((4, 5))}, "image: expected .* float32, got .* float64"),
        ({"image": np.zeros((4, 5, 1), np.float32)}, "truth: expected"),
        ({"predictions": {"base": np.zeros((4, 4), np.uint8)}}, "base: expected"),
        ({"spacing": np.array([1.0, 0.0])}, "spacing: expected two lengths"),
    ],
)
def test_an_overlay_that_does_not_fit_together_is_refused_whole(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    folder = RunFolder(tmp_path)
    save_overlays(folder, [_overlay()])
    with pytest.raises(RunError, match=words):
        save_overlays(folder, [_overlay(), replace(_overlay(), **change)])  # type: ignore[arg-type]
    assert len(load_overlays(folder)) == 1


def test_a_damaged_overlay_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_overlays(folder, [_overlay(), _overlay()])
    path = tmp_path / "overlays" / "02.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"02\.npz: damaged, cut short"):
        load_overlays(folder)


def test_an_overlay_that_would_need_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    np.savez(tmp_path / "overlays" / "01.npz", about=np.array([{"site": "s"}], dtype=object))
    with pytest.raises(RunError, match=r"01\.npz: damaged"):
        load_overlays(RunFolder(tmp_path))


def _row(dice: float | None, hd95: float | None, volume_error: float | None) -> TestRow:
    return TestRow(
        arm="base", site="s", person="p", case="c", label="l",
        dice=dice, hd95=hd95, volume_error=volume_error,
    )  # fmt: skip


def _overlay() -> Overlay:
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 3, (4, 5)).astype(np.uint8)
    return Overlay(
        site="north",
        person="p1",
        case="c1",
        slice_index=2,
        image=rng.normal(size=(4, 5)).astype(np.float32),
        truth=mask,
        predictions={"base": mask[::-1], "federated": mask.copy()},
        spacing=np.array([2.0, 1.5]),
        orientation="RA",
    )
