"""What the aggregation error of a run means, in words that fit its strategy."""

from collections.abc import Sequence

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunInfo
from dafne_federated.core.strategy_table import STRATEGY_TABLE

_MEANS = {
    "product": "what the cut of the mean update to rank {rank} left out",
    "global+local": (
        "what the cut of the mean update of the global part to rank {rank} left out; the parts "
        "that stay at the sites are not in it"
    ),
    "stack": "what is beyond the {bound} directions that max-rank allows; the rest is exact",
    "factors": (
        "how far the product of the mean factors is from the mean of the products, by cross terms "
        "between sites"
    ),
}
_COMMON = "one factor of each pair is the same at all sites, so the mean of the other is exact"
_ARRAYS = "whole arrays add up, so their mean is exact"


def aggregation_words(info: RunInfo, plan: AdaptationPlan, rounds: Sequence[RoundLine]) -> str:
    """Return one paragraph about the aggregation error by round; empty before the first round.

    Args:
        info: What the run was started with.
        plan: Its plan.
        rounds: Its rounds so far.
    """
    errors = [line.aggregation_error for line in rounds if line.aggregation_error is not None]
    if not errors:
        return ""
    strategy = info.settings.strategy
    rules = STRATEGY_TABLE[strategy]
    if not any(target.low_rank for target in plan.targets):
        return f"Aggregation error: none; {_ARRAYS}."
    if rules.odd.personal:
        return (
            "Aggregation error: there is none to state, because nobody but the sites knows what "
            "their own factors do; what they share is averaged exactly."
        )
    if rules.odd.held and rules.even.held:
        return f"Aggregation error: none; {_COMMON}."
    meaning = _MEANS.get(strategy, "the distance of the result from the exact mean update")
    words = (
        f"Aggregation error by round, as a share of the exact mean update: {percents(errors)}. "
        f"It is {meaning.format(rank=plan.rank, bound=plan.max_rank)}."
    )
    if any(not line.whole for line in rounds):
        words += (
            " Sites of smaller rank trained a cut of the state; what they were not given was put "
            "back into their updates first, so it counts as it was."
        )
    return words


def percents(errors: Sequence[float]) -> str:
    """Return shares as percentages, e.g. ``12 %, 3.4 %``."""
    return ", ".join(f"{100 * error:.3g}\u202f%" for error in errors)
