"""Dafne's own minimum decides which slices count as usable."""

import numpy as np
import pytest

from dafne_federated.core.case_check import drawn_labels, labelled_slices, usable_slices
from dafne_federated.core.volumes import Case


def make_case(**masks: np.ndarray) -> Case:
    image = np.zeros(next(iter(masks.values())).shape, np.float32)
    return Case("one", "anna", "", image, masks, (1.0, 1.0, 5.0), None)


@pytest.mark.parametrize(
    ("labels", "pixels", "usable"),
    [
        (1, [6], True),
        (1, [5], False),
        (2, [6, 5], False),
        (2, [6, 6], True),
        (4, [6, 6, 0, 0], False),
        (4, [6, 6, 6, 0], True),
        (5, [6, 6, 6, 0, 0], True),
    ],
)
def test_a_slice_counts_as_dafne_counts_it(labels: int, pixels: list[int], usable: bool) -> None:
    masks: dict[str, np.ndarray] = {}
    for index, count in enumerate(pixels):
        masks[str(index)] = np.zeros((5, 5, 1), bool)
        masks[str(index)].reshape(-1)[:count] = True
    case = make_case(**masks)
    assert usable_slices(case, [str(i) for i in range(labels)]).tolist() == [usable]


def test_left_and_right_of_a_label_are_one_label() -> None:
    left, right = np.zeros((2, 5, 5, 2), bool)
    left[0, :3, 0] = right[1, :3, 0] = True  # 6 pixels only together
    right[2, :, 1] = True  # 5 pixels
    case = make_case(vastus_L=left, vastus_R=right)
    assert usable_slices(case, ["vastus"]).tolist() == [True, False]
    assert labelled_slices(case).tolist() == [True, True]
    assert drawn_labels(case, ["vastus", "rectus"]) == {"vastus"}
