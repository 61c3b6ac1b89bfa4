"""What an arm drew on an image, beside the truth: turned upright and cut out."""

from dataclasses import replace
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from dafne_federated.simulations.figures import COLOURS, PIXELS_PER_INCH, STYLE, Picture, picture
from dafne_federated.simulations.test_results import Overlay

Labels = NDArray[np.uint8]

# Towards what the screen's down and right run when a doctor looks at a slice: from the feet
# (axial) and with the patient's left on the right, or with the face on the left (sagittal).
_UPRIGHT: Final = {"RLAP": "PL", "APSI": "IP", "RLSI": "IL"}
_OPPOSITE: Final = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
_WIDTH: Final = 236  # CSS pixels
_HEIGHT: Final = 300  # at most
_MARGIN: Final = 0.2  # around the masks, as a share of their longer side
_FILL: Final = 0.35
_HATCHES: Final = ("////", "\\\\\\\\", "----", "||||", "xxx", "+++", "...")


def upright(overlay: Overlay) -> Overlay:
    """Return the overlay turned as a doctor looks at it; unchanged where directions are unknown."""
    letters = overlay.orientation
    wanted = next((w for axes, w in _UPRIGHT.items() if letters and set(letters) <= set(axes)), "")
    if not wanted:
        return overlay
    turned = letters[0] not in (wanted[0], _OPPOSITE[wanted[0]])
    found = letters[::-1] if turned else letters
    rows, columns = (1 if have == want else -1 for have, want in zip(found, wanted, strict=True))

    def turn(plane: NDArray[Any]) -> NDArray[Any]:
        return (plane.T if turned else plane)[::rows, ::columns]

    return replace(
        overlay,
        image=turn(overlay.image),
        truth=turn(overlay.truth),
        predictions={arm: turn(mask) for arm, mask in overlay.predictions.items()},
        spacing=overlay.spacing[::-1] if turned else overlay.spacing,
        orientation=wanted,
    )


def overlay_pictures(overlay: Overlay) -> dict[str, Picture]:
    """Draw the truth and each arm on the image, cut out around all masks, upright.

    The truth is drawn as an outline, with the labels' numbers in the first picture; what an
    arm drew is filled with the labels' colours.
    """
    shown = _cut_out(upright(overlay))
    where = f"slice {overlay.slice_index + 1} of {overlay.case}"
    pictures = {"truth": _draw(shown, None, f"Truth on {where}")}
    for arm, mask in shown.predictions.items():
        pictures[arm] = _draw(shown, mask, f"{arm.capitalize()} model on {where}")
    return pictures


def label_swatch(number: int) -> Picture:
    """Return the colour of label ``number`` (1 first), with the number, for a legend."""
    figure = Figure(figsize=(20 / PIXELS_PER_INCH, 16 / PIXELS_PER_INCH), facecolor=_colour(number))
    ink = "black" if _luminance(number) > 0.3 else "white"
    figure.text(0.5, 0.46, str(number), ha="center", va="center", fontsize=8, color=ink)
    return picture(figure, "")


def _cut_out(overlay: Overlay) -> Overlay:
    """Return what lies around the masks; all of it where there are none."""
    drawn = overlay.truth > 0
    for mask in overlay.predictions.values():
        drawn = drawn | (mask > 0)
    if not drawn.any():
        return overlay
    sizes = overlay.spacing
    first, last = np.argwhere(drawn).min(axis=0), np.argwhere(drawn).max(axis=0) + 1
    margin = np.maximum(_MARGIN * ((last - first) * sizes).max() / sizes, 3).astype(int)
    top, left = np.maximum(first - margin, 0)
    bottom, right = np.minimum(last + margin, drawn.shape)
    window = np.s_[top:bottom, left:right]
    return replace(
        overlay,
        image=overlay.image[window],
        truth=overlay.truth[window],
        predictions={arm: mask[window] for arm, mask in overlay.predictions.items()},
    )


def _draw(overlay: Overlay, predicted: Labels | None, alt: str) -> Picture:
    rows, columns = overlay.truth.shape
    tall, wide = rows * overlay.spacing[0], columns * overlay.spacing[1]
    scale = min(_WIDTH / wide, _HEIGHT / tall) / PIXELS_PER_INCH
    with matplotlib.rc_context({**STYLE, "hatch.linewidth": 0.5}):
        figure = Figure(figsize=(wide * scale, tall * scale))
        axes = figure.add_axes((0, 0, 1, 1))
        image = np.nan_to_num(overlay.image, posinf=0.0, neginf=0.0)
        low, high = np.percentile(image, [1, 99.5])
        axes.imshow(
            image,
            cmap="gray",
            vmin=low,
            vmax=max(high, low + 1e-6),
            interpolation="bilinear",
            aspect="auto",
        )
        true = {number: overlay.truth == number for number in _numbers(overlay.truth)}
        for mask in true.values():
            _outline(axes, mask, "black", 3.2 if predicted is None else 2.4)
        if predicted is not None:
            fill = np.zeros((rows, columns, 4))
            for number in _numbers(predicted):
                fill[predicted == number] = (*to_rgb(_colour(number)), _FILL)
            axes.imshow(fill, interpolation="nearest", aspect="auto")
            for number in _numbers(predicted):
                _hatch(axes, predicted == number, number)
                _outline(axes, predicted == number, "black", 2.2)
                _outline(axes, predicted == number, _colour(number), 1.2)
        for number, mask in true.items():
            _outline(axes, mask, _colour(number) if predicted is None else "white", 1.2)
            if predicted is None:
                _number(axes, mask, number, overlay.spacing)
        _letters(axes, overlay.orientation)
        axes.set_axis_off()
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        return picture(figure, alt)


def _numbers(label_map: Labels) -> list[int]:
    return [int(number) for number in np.unique(label_map) if number]


def _hatch(axes: Any, mask: NDArray[np.bool_], number: int) -> None:
    """Hatch a mask, so that what was drawn is seen in grey print, too."""
    if min(mask.shape) > 1:
        pattern = _HATCHES[(number - 1) % len(_HATCHES)]
        area = axes.contourf(mask, levels=[0.5, 1.5], colors="none", hatches=[pattern])
        area.set_edgecolor(0.4 + 0.6 * np.array(to_rgb(_colour(number))))
        area.set_linewidth(0)


def _outline(axes: Any, mask: NDArray[np.bool_], colour: str, width: float) -> None:
    """Draw the edges of the pixels of a mask, exactly where they are."""
    padded = np.pad(mask, 1).astype(np.int8)
    lines = [
        [(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)]
        for row, column in np.argwhere(np.diff(padded, axis=0))
    ]
    lines += [
        [(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)]
        for row, column in np.argwhere(np.diff(padded, axis=1))
    ]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="round"))


def _number(axes: Any, mask: NDArray[np.bool_], number: int, spacing: NDArray[np.float64]) -> None:
    """Write a label's number where its mask is widest."""
    depth = distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), mask.shape)
    halo = [withStroke(linewidth=2.2, foreground="black")]
    axes.text(
        column, row, str(number), ha="center", va="center", color="white", fontweight="bold",
        fontsize=9, path_effects=halo,
    )  # fmt: skip


def _letters(axes: Any, letters: str) -> None:
    """Name the directions at the edges."""
    if not letters:
        return
    down, right = letters[0], letters[1]
    places = {
        down: (0.5, 0.02, "center", "bottom"),
        _OPPOSITE[down]: (0.5, 0.98, "center", "top"),
        right: (0.98, 0.5, "right", "center"),
        _OPPOSITE[right]: (0.02, 0.5, "left", "center"),
    }
    halo = [withStroke(linewidth=2.0, foreground="black")]
    for letter, (x, y, horizontal, vertical) in places.items():
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=horizontal, va=vertical, color="white",
            fontsize=9, path_effects=halo,
        )  # fmt: skip


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


def _luminance(number: int) -> float:
    return float(np.dot(np.array(to_rgb(_colour(number))) ** 2.2, (0.2126, 0.7152, 0.0722)))
