"""What the sites of a run pooled before its first round, as it is kept and used."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.model_file import Weights
from dafne_federated.core.moments import Moments, statistics_change
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State

Number = Annotated[int, Field(ge=0)]


class PooledMoments(BaseModel):
    """Moments of what one normalisation is given, for each channel."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slices: int = Field(ge=1)
    mean: list[float]
    variance: list[Annotated[float, Field(ge=0)]]


class PooledSite(BaseModel):
    """What one site gave to the pool.

    Attributes:
        status: ``shared``, ``withheld`` by the site's own rules, ``refused`` by the server,
            ``failed`` at the site, or ``silent``.
        reason: In words, where it is not shared.
        slices: Its training slices; 0 where it shared nothing.
        dice: Dice of the base on its validation cases, by label; None where not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    status: Literal["shared", "withheld", "refused", "failed", "silent"] = "shared"
    reason: str = ""
    slices: int = 0
    dice: dict[str, float | None] = Field(default_factory=dict)


class PooledStatistics(BaseModel):
    """The pool of a run.

    Attributes:
        sites: By registered name.
        moments: For each normalisation of the plan, in its order; none if they stay the base's.
        class_pixels: Pixels of each output channel, background first; none if not pooled.
        class_slices: Slices that hold each of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: dict[str, PooledSite] = Field(default_factory=dict)
    moments: list[PooledMoments] = Field(default_factory=list)
    class_pixels: list[Number] = Field(default_factory=list)
    class_slices: list[Number] = Field(default_factory=list)

    @property
    def classes(self) -> ClassCounts | None:
        """The pooled counts of the classes, if there are any."""
        if not self.class_pixels:
            return None
        return ClassCounts(tuple(self.class_pixels), tuple(self.class_slices))


def pooled_state(
    plan: AdaptationPlan, base: Weights, found: Sequence[PooledMoments | Moments]
) -> State:
    """Return the state arrays that bring the first normalisations of a plan to what was found.

    Args:
        plan: The plan.
        base: Weights of the base by weight key.
        found: Moments for the first normalisations of the plan, in its order.
    """
    state: State = {}
    for (mean, variance), one in zip(plan.normalisations, found, strict=False):
        rows = np.array(one.mean, np.float64), np.array(one.variance, np.float64)
        stored = base[mean.key], base[variance.key]
        state |= statistics_change(mean, variance, stored, Moments(1, *rows))
    return state
