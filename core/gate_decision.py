"""What the acceptance gate decided, and on what: part of the record of a run."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class GateLine(BaseModel):
    """One label at one site, or at all of them together.

    Attributes:
        site: Its name; empty for all together.
        label: The label.
        persons: Persons who accept that have it; where a site has none, those who choose.
        change: Mean of the paired differences of Dice.
        lower: Lower end of their interval; None with too few persons for one.
        falls: Whether it may fall by more than the margin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    site: str
    label: str
    persons: int
    change: float
    lower: float | None
    falls: bool


class GateDecision(BaseModel):
    """Whether one state may be released.

    Attributes:
        accepted: Whether it may.
        reason: Why not, in words; empty if it may.
        few: Whether there were too few persons to decide.
        persons: Persons who accept, of all sites and the reference folder.
        change: Mean change over sites of the mean over labels; None without any person.
        lines: By label, and by site and label.
        looked_at: Rounds that those who accept have judged, this one last.
        against: What the state is compared with: the base, or the release that the run started
            from.
        base: The same against the base, for a state that passed against such a release.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    accepted: bool
    reason: str
    few: bool
    persons: int
    change: float | None
    lines: tuple[GateLine, ...]
    looked_at: tuple[int, ...] = ()
    against: Literal["base", "start"] = "base"
    base: "GateDecision | None" = None
