"""Overlays stand as a doctor looks at them, in true proportions, with nothing mirrored."""

import base64
import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest

from dafne_federated.simulations.figures import Picture
from dafne_federated.simulations.overlay_pictures import label_swatch, overlay_pictures, upright
from dafne_federated.simulations.test_results import Overlay

OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
UPRIGHT = {"RLAP": "PL", "APSI": "IP", "RLSI": "IL"}


@pytest.mark.parametrize("axes", UPRIGHT)
def test_every_orientation_of_a_plane_gives_the_same_upright_slice(axes: str) -> None:
    wanted = UPRIGHT[axes]
    image = np.arange(12, dtype=np.float32).reshape(3, 4)
    standing = _overlay(image, wanted, (2.0, 1.0))
    for swap, rows, columns in itertools.product((False, True), (1, -1), (1, -1)):
        letters = "".join(
            letter if step == 1 else OPPOSITE[letter]
            for letter, step in zip(wanted, (rows, columns), strict=True)
        )
        stored = image[::rows, ::columns]
        spacing = (2.0, 1.0)
        if swap:
            stored, letters, spacing = stored.T, letters[::-1], (1.0, 2.0)
        found = upright(_overlay(np.ascontiguousarray(stored), letters, spacing))
        assert found.orientation == wanted
        np.testing.assert_array_equal(found.image, standing.image)
        np.testing.assert_array_equal(found.truth, standing.truth)
        np.testing.assert_array_equal(found.predictions["base"], standing.predictions["base"])
        assert found.spacing.tolist() == [2.0, 1.0]


def test_a_slice_of_unknown_orientation_stays_as_it_is() -> None:
    overlay = _overlay(np.zeros((3, 4), np.float32), "", (1.0, 1.0))
    assert upright(overlay) is overlay


@pytest.mark.parametrize("orientation", ["", "RA"])
def test_pictures_keep_the_proportions_of_the_body(orientation: str) -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 10:30] = 1
    overlay = replace(
        _overlay(np.zeros((40, 40), np.float32), orientation, (3.0, 1.0)),
        truth=truth,
        predictions={"federated": truth},
    )
    pictures = overlay_pictures(overlay)
    assert list(pictures) == ["truth", "federated"]
    for picture in pictures.values():
        width, height = _pixels(picture)
        # 20 rows of 3 mm, 20 columns of 1 mm, 12 mm around: 84 mm by 40 mm, cut at the edge
        tall = 84 / 40 if not orientation else 40 / 84
        assert height / width == pytest.approx(tall, rel=0.03)
        assert picture.height / picture.width == pytest.approx(tall, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 5)])
def test_odd_slices_are_drawn(shape: tuple[int, int]) -> None:
    image = np.full(shape, np.nan, np.float32)
    full = np.full(shape, 9, np.uint8)
    for truth, predicted in itertools.product((full, 0 * full), repeat=2):
        overlay = Overlay("s", "p", "c", 0, image, truth, {"base": predicted}, np.array([1.0, 1.0]))
        assert all(_pixels(picture)[0] > 0 for picture in overlay_pictures(overlay).values())


def test_the_same_slice_gives_the_same_bytes() -> None:
    overlay = _overlay(np.eye(6, dtype=np.float32), "RA", (1.0, 1.0))
    assert overlay_pictures(overlay) == overlay_pictures(overlay)


def test_labels_have_different_swatches() -> None:
    assert len({label_swatch(number).uri for number in range(1, 11)}) == 10


def _overlay(image: np.ndarray, orientation: str, spacing: tuple[float, float]) -> Overlay:
    truth = (image > image.mean()).astype(np.uint8)
    return Overlay(
        "s", "p", "c", 0, image, truth, {"base": 2 * truth}, np.array(spacing), orientation
    )


def _pixels(picture: Picture) -> tuple[int, int]:
    """Return width and height as the PNG itself says."""
    data = base64.b64decode(picture.uri.removeprefix("data:image/png;base64,"))
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)
