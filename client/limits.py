"""What a site's people agreed to, as far as its settings say: methods, epochs, time, cases.

Each limit refuses in plain words, and what is refused leaves nothing behind. None of them makes
training other than it would be without: a round is trained as it was asked for, or not at all,
so that no result depends on how fast a machine is.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.errors import ApprovalError
from dafne_federated.core.plan import AdaptationPlan

if TYPE_CHECKING:
    from dafne_federated.core.training import Batches


def require_cases(settings: SiteSettings) -> None:
    """Refuse everything while there are too few cases.

    Raises:
        ApprovalError: There are fewer training cases than the site wants to take part with.
    """
    if len(settings.training) < settings.min_cases:
        msg = f"this site takes part with at least {settings.min_cases} training cases"
        raise ApprovalError(msg)


def require_method(settings: SiteSettings, plan: AdaptationPlan) -> None:
    """Refuse a plan by the method that it names.

    Raises:
        ApprovalError: The site does not train by it.
    """
    if settings.methods is None:
        return
    if others := [part for part in plan.method.split("+") if part not in settings.methods]:
        allowed = ", ".join(settings.methods) or "none"
        msg = f"this site trains only by these methods: {allowed}; the run takes {others[0]!r}"
        raise ApprovalError(msg)


def require_epochs(settings: SiteSettings, epochs: int) -> None:
    """Refuse a round that trains for longer than the site agrees to.

    Raises:
        ApprovalError: It asks for more epochs.
    """
    if epochs > settings.max_epochs:
        msg = f"this site trains at most {settings.max_epochs} epochs a round"
        raise ApprovalError(msg)


class Clock:
    """The time that a site may spend on one message; it starts when it is made.

    Args:
        seconds: The limit; None for none.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + (seconds or 0.0)

    def check(self) -> None:
        """Give up what is being done if the time is over.

        Raises:
            ApprovalError: It is.
        """
        if self.seconds is not None and time.monotonic() > self._end:
            msg = f"this site works at most {self.seconds:g} s on a message, and this needs longer"
            raise ApprovalError(msg)

    def over(self, slices: "Batches") -> "Batches":
        """Return slices that check the time with each batch that is taken of them."""
        return slices if self.seconds is None else _Timed(slices, self)


@dataclass(frozen=True)
class _Timed:
    slices: "Batches"
    clock: Clock

    def __len__(self) -> int:
        return len(self.slices)

    def batch(self, chosen: npt.NDArray[np.intp]) -> tuple[Any, npt.NDArray[np.float32]]:
        self.clock.check()
        return self.slices.batch(chosen)
