"""From the usable updates of a round to its state: weighed, averaged, stepped, rounded."""

import logging
import time
from dataclasses import dataclass

from dafne_federated.core.state import State
from dafne_federated.core.strategy_table import COORDINATE_RULES, bad_left
from dafne_federated.core.wire_arrays import rounded
from dafne_federated.server.continuation import stand_ins
from dafne_federated.server.federation import Federation
from dafne_federated.server.server_optimiser import stepped
from dafne_federated.server.site_noise import bounded_updates, with_site_noise
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.robust import ROBUST_RULES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Combination:
    """What a round of training came to.

    Attributes:
        state: The state as the sites will get it, which is what is kept and may be released.
        error: See ``Aggregate``; before the state is rounded to the type that travels.
        seconds: Wall time of combining.
        shares: How much of its weight each update kept that was not left out, by site; None
            where all kept theirs.
    """

    state: State
    error: float | None = None
    seconds: float = 0.0
    shares: dict[str, float] | None = None


def combined(
    run: Federation, number: int, sent: State, updates: list[Update], refused: int
) -> Combination:
    """Return what becomes of ``sent`` in round ``number``.

    Args:
        run: The federation.
        number: The round.
        sent: The state that the round started from.
        updates: Those that can be used.
        refused: How many updates the gate refused.
    """
    settings, plan, begun = run.settings, run.plan, time.monotonic()
    bad = bad_left(settings.robust, settings.bad_sites, len(updates), refused)
    given = list(updates)
    if run.continued:
        given += stand_ins(run.continued, plan, run.first, updates)
    chosen = ROBUST_RULES[settings.robust](plan, given, bad or 0, sent)
    chosen = bounded_updates(settings, plan, number, sent, chosen)
    shares = None
    weighs = settings.robust not in ("none", *COORDINATE_RULES)
    names = {update.site for update in updates}
    if weighs or any(update.share < 1 for update in chosen if update.site in names):
        shares = {update.site: update.share for update in chosen if update.site in names}
        run.folder.event("weighed", round=number, rule=settings.robust, bad=bad, shares=shares)
    aggregate = STRATEGIES[settings.strategy](plan, chosen)
    count = len(updates)
    mean = with_site_noise(run.folder, settings, plan, number, sent, aggregate.state, count)
    new = stepped(run.folder, settings, plan, number, sent, mean)
    log.info("round %d: aggregation error %.2g", number, aggregate.error)
    return Combination(
        state=rounded(plan, new, settings.wire),
        error=aggregate.error,
        seconds=time.monotonic() - begun,
        shares=shares,
    )
