"""Agreement figures equal hand-worked ones, and empty masks have a stated meaning."""

import numpy as np
import pytest

from dafne_federated.core.metrics import (
    Agreement,
    agreement,
    dice,
    hd95,
    judged,
    mean,
    mean_dice,
    volume_error,
)


def box(*corner: int, size: int = 4) -> np.ndarray:
    mask = np.zeros((16, 16, 8), bool)
    mask[tuple(slice(c, c + size) for c in corner)] = True
    return mask


EMPTY = np.zeros((16, 16, 8), bool)


def test_dice_by_hand() -> None:
    assert dice(box(2, 2, 2), box(2, 2, 2)) == 1.0
    assert dice(box(2, 2, 2), box(4, 2, 2)) == pytest.approx(0.5)  # half of each overlaps
    assert dice(box(2, 2, 2), box(10, 10, 2)) == 0.0


def test_hd95_is_in_mm_along_the_axis_it_lies_on() -> None:
    assert hd95(box(2, 2, 2), box(2, 2, 2), (1, 1, 1)) == 0.0
    assert hd95(box(2, 2, 2), box(5, 2, 2), (0.5, 1, 1)) == pytest.approx(1.5)
    assert hd95(box(2, 2, 2), box(2, 2, 4), (1, 1, 3)) == pytest.approx(6.0)


def test_volume_error_has_a_sign() -> None:
    assert volume_error(box(2, 2, 2), box(2, 2, 2, size=2)) == pytest.approx(-87.5)
    assert volume_error(box(2, 2, 2, size=2), box(2, 2, 2)) == pytest.approx(700)


def test_empty_masks() -> None:
    full = box(2, 2, 2)
    assert (dice(EMPTY, EMPTY), dice(EMPTY, full), dice(full, EMPTY)) == (None, 0.0, 0.0)
    assert hd95(EMPTY, full, (1, 1, 1)) is None
    assert hd95(full, EMPTY, (1, 1, 1)) is None
    assert volume_error(EMPTY, full) is None
    assert volume_error(full, EMPTY) == -100.0


def test_a_label_that_was_not_annotated_is_not_judged() -> None:
    rows = agreement("case", {"a": box(2, 2, 2)}, {"a": box(2, 2, 2), "b": EMPTY}, (1, 1, 1))
    assert rows == [Agreement("case", "a", 1.0, 0.0, 0.0)]


def test_every_label_counts_the_same_in_the_mean() -> None:
    def row(label: str, value: float | None, volume: float | None = 0.0) -> Agreement:
        return Agreement("case", label, value, None, volume)

    absent = [row("a", None, None), row("b", 0.0, None)]  # right, and wrong, about nothing
    rows = [row("a", 1.0), row("a", 0.0), row("b", 0.9), *absent]
    assert mean_dice(rows) == pytest.approx((0.5 + 0.9) / 2)
    assert judged(absent) == []
    assert mean([]) is None
    assert mean([None, 2.0]) == 2.0
