"""Turn our model functions into the source texts that a `.model` file carries."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dafne_federated.core import dafne_functions
from dafne_federated.core.errors import ModelFileError, SettingsError

SMALLEST: Final = 16  # rows and columns of a network's input
LARGEST: Final = 1024
COARSEST: Final = 100.0  # mm; a pixel as large as a limb


PixelSize = Annotated[float, Field(gt=0, le=COARSEST)]


class NetworkSpec(BaseModel):
    """What a new model looks like: its labels, its grid and its network.

    Attributes:
        labels: Label names, channel 1 first.
        size: Rows and columns of the network's input, in pixels; square, as Dafne's
            preprocessing demands.
        resolution: Pixel size of the network's input, in mm.
        filters: Channels of each level, the bottom one last.
        strides: How much smaller each next level is; one fewer than ``filters``.
        bias_levels: Fitting levels of the N4 bias field correction.
        sides: Whether the model is trained on right sides and mirrors left ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: tuple[str, ...] = Field(min_length=1, max_length=254)
    size: int = Field(ge=SMALLEST, le=LARGEST)
    resolution: tuple[PixelSize, PixelSize]
    filters: tuple[int, ...] = Field(default=(16, 32, 64, 128), min_length=2)
    strides: tuple[int, ...] = Field(default=(2, 2, 2), min_length=1)
    bias_levels: int = Field(default=4, ge=1, le=8)
    sides: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.strides) != len(self.filters) - 1:
            msg = f"strides: expected {len(self.filters) - 1} numbers, got {len(self.strides)}"
            raise ValueError(msg)
        if len(set(self.labels)) != len(self.labels):
            msg = f"labels: expected different names, got {self.labels}"
            raise ValueError(msg)
        return self

    def sources(self) -> dict[str, str]:
        """Return the function sources of such a model, by their key in the file."""
        constants = {
            "LABELS_DICT": dict(enumerate(self.labels, start=1)),
            "MODEL_RESOLUTION": list(self.resolution),
            "MODEL_SIZE": [self.size, self.size],
            "FILTERS": list(self.filters),
            "STRIDES": list(self.strides),
            "BIASCORRECTION_LEVELS": self.bias_levels,
            "SIDES": self.sides,
        }
        functions: dict[str, Callable[..., Any]] = {
            "init_model_function": dafne_functions.init_model,
            "apply_model_function": dafne_functions.apply_model,
            "incremental_learn_function": dafne_functions.incremental_learn,
        }
        return {
            key: with_constants(inspect.getsource(function), constants)
            for key, function in functions.items()
        }


def check_grid(size: int | None, resolution: float | None) -> None:
    """Check the rows and columns (pixels) and the pixel size (mm) that somebody asked for.

    Raises:
        SettingsError: One of them is out of range.
    """
    if size is not None and not SMALLEST <= size <= LARGEST:
        msg = f"size: expected {SMALLEST} to {LARGEST} pixels, got {size}"
        raise SettingsError(msg)
    if resolution is not None and not 0 < resolution <= COARSEST:
        msg = f"resolution: expected more than 0 and at most {COARSEST:g} mm, got {resolution}"
        raise SettingsError(msg)


def thigh_spec(labels: Sequence[str] | None = None, sides: bool = False) -> NetworkSpec:
    """Return the geometry of Dafne's thigh network: 250 x 250, 12 labels, 26.6 M parameters.

    Args:
        labels: Other label names, channel 1 first.
        sides: Whether left sides are mirrored; see ``NetworkSpec``.

    Source:
        ``generate_thigh_split_model.py`` of the dafne-models repository (sizes, filters,
        strides and label names; the text of the functions is ours).
    """
    muscles = (
        *("Vastus Lateralis", "Vastus Medialis", "Vastus Intermedius", "Rectus Femoris"),
        *("Sartorius", "Gracilis", "Adductor Magnus", "Semimembranosus", "Semitendinosus"),
        *("Biceps Femoris Long", "Biceps Femoris Short", "Adductor Longus"),
    )
    return NetworkSpec(
        labels=muscles if labels is None else tuple(labels),
        size=250,
        resolution=(1.037037, 1.037037),
        filters=(32, 64, 128, 256, 512, 1024),
        strides=(2, 2, 2, 2, 3),
        bias_levels=8,
        sides=sides,
    )


def with_constants(source: str, constants: Mapping[str, Any]) -> str:
    """Return the source of a function with literal constants at its top replaced.

    Names in ``constants`` that the function does not assign are left out.

    Raises:
        ModelFileError: The text is not the source of one function.
    """
    try:
        (function,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        msg = "expected the source text of one function"
        raise ModelFileError(msg) from None
    if not isinstance(function, ast.FunctionDef):
        msg = f"expected the source text of a function, got a {type(function).__name__}"
        raise ModelFileError(msg)
    for node in function.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in constants:
                node.value = ast.parse(repr(constants[name]), mode="eval").body
    return ast.unparse(ast.fix_missing_locations(function)) + "\n"
