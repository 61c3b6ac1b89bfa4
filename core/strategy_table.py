"""What each strategy asks of the sites and what it combines with, in one table.

Server and sites read the same table: which factors of the low-rank pairs a site trains in a
round, and which of them it sends. Whole arrays (``delta``, ``scale``) are trained and sent in
every round; stored statistics of normalisations are sent and stay as they are, with every
strategy. What comes down is always the whole state, so that a site that missed a round, or was
started again, needs nothing from before.

What combines, as ``check_combination`` and ``server/membership.py`` enforce it:

| strategy     | pairs  | own ranks | proximal | server optimiser | late 'use' | release | noisy |
|--------------|--------|-----------|----------|------------------|------------|---------|-------|
| fedavg       | never  | no        | yes      | yes              | yes        | yes     | none  |
| factors      | maybe  | no        | yes      | no               | yes        | yes     | both  |
| frozen-a     | always | no        | yes      | yes              | yes        | yes     | one   |
| alternating  | always | no        | yes      | yes              | no         | yes     | one   |
| product      | maybe  | yes       | yes      | no               | yes        | yes     | both  |
| stack        | always | yes       | yes      | no               | yes        | yes     | both  |
| shared-a     | always | no        | no       | no               | yes        | no      | both  |
| global+local | always | yes       | no       | no               | yes        | yes     | both  |

Low-rank pairs come from method 'lora', alone or with others; every other method changes whole
arrays. Robust rules choose or weigh updates and go with every strategy. Ranks of their own need
products to be averaged; a factor that stands still must be the same everywhere, and with
``alternating`` it is another one in the round before. A proximal term holds sites to a state that
all of them have. A server optimiser remembers the changes of the rounds before, which is only
right where a change is a plain sum of arrays that mean the same in each round: ``fedavg``,
``frozen-a``, and ``alternating`` for each factor by itself. A cut turns the basis of pairs, and
the mean of both factors is no sum of what the sites changed.

With privacy 'person' each site adds the noise before anything leaves it, so what the server
makes of it costs nothing more and every strategy and robust rule holds. The last column says in
how many factors of a pair there is noise in one round: noise in both multiplies
(https://arxiv.org/abs/2403.12313), so 'frozen-a' suits it best. Factors that stay at their site
('shared-a', 'global+local') are clipped and get noise together with what leaves. Refused are
pooled statistics and pooled class weights, which leave without noise, and kept optimisers and a
proximal term, for private steps have neither.

With privacy 'site' the server adds noise to the mean change of a round, which must be a plain
sum for that: it goes with the strategies that allow a server optimiser, and with these alone.
What else it needs stands in ``core/privacy_rules.py``.
"""

from dataclasses import dataclass
from typing import Literal

from dafne_federated.core.errors import SettingsError

Factors = Literal["both", "a", "b"]
OptimiserChoice = Literal["fresh", "kept"]  # of a site, from round to round


@dataclass(frozen=True)
class RoundRule:
    """What moves in one round.

    Attributes:
        trained: The factors that sites train; the other one stays as it came.
        sent: The factors that come back. One that is trained and not sent is personal: it
            stays at the site from round to round.
    """

    trained: Factors = "both"
    sent: Factors = "both"

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the factors that stay as they came."""
        return tuple(part for part in ("a", "b") if self.trained not in ("both", part))

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the factors that do not come back."""
        return tuple(part for part in ("a", "b") if self.sent not in ("both", part))

    @property
    def personal(self) -> tuple[str, ...]:
        """Names of the factors that are trained and stay at the site."""
        return tuple(part for part in self.absent if part not in self.held)


@dataclass(frozen=True)
class StrategyRules:
    """One row of the table.

    Attributes:
        does: What the server makes of the updates, in words.
        odd: What moves in rounds 1, 3, 5...
        even: What moves in the others.
        pairs: Whether the plan may have low-rank pairs: ``never``, ``maybe`` or ``always``.
        ranks: Whether each site may have a rank of its own.
        grows: Whether sites without a rank of their own get the state at whatever rank it has.
        sums: Whether the change of a round is a plain sum of arrays, so that a server optimiser
            may remember it.
        proximal: Whether all that a site trains starts from a common state, so that a proximal
            term may hold it there.
        local: Whether each site adds low-rank pairs of its own, which stay there.
        common: Whether there is a model for everybody that can be released.
        late: Whether an update of the round before may be combined with those of a round.
    """

    does: str
    odd: RoundRule = RoundRule()
    even: RoundRule = RoundRule()
    pairs: Literal["never", "maybe", "always"] = "maybe"
    ranks: bool = False
    grows: bool = False
    sums: bool = False
    proximal: bool = True
    local: bool = False
    common: bool = True
    late: bool = True

    @property
    def noisy(self) -> Literal["none", "one", "both"]:
        """In how many factors of a pair one round puts noise that hides persons."""
        if self.pairs == "never":
            return "none"
        return "both" if "both" in (self.odd.trained, self.even.trained) else "one"


_ONLY_A, _ONLY_B = RoundRule("a", "a"), RoundRule("b", "b")
_A_IS_SHARED = RoundRule("both", "a")

STRATEGY_TABLE: dict[str, StrategyRules] = {
    "fedavg": StrategyRules("the mean of whole arrays", pairs="never", sums=True),
    "factors": StrategyRules("the mean of each factor, which is not that of the products"),
    "frozen-a": StrategyRules(
        "the mean of b; a is random, common and never trained",
        _ONLY_B,
        _ONLY_B,
        pairs="always",
        sums=True,
    ),
    "alternating": StrategyRules(
        "the mean of b in odd rounds, of a in even ones",
        _ONLY_B,
        _ONLY_A,
        pairs="always",
        sums=True,
        late=False,
    ),
    "product": StrategyRules("the mean of the products, cut to the rank", ranks=True),
    "stack": StrategyRules(
        "the mean of the products, uncut up to the largest rank",
        pairs="always",
        ranks=True,
        grows=True,
    ),
    "shared-a": StrategyRules(
        "the mean of a; each site keeps its own b",
        _A_IS_SHARED,
        _A_IS_SHARED,
        pairs="always",
        proximal=False,
        common=False,
    ),
    "global+local": StrategyRules(
        "the mean of the products of a global part; each site adds a local one that stays there",
        pairs="always",
        ranks=True,
        proximal=False,
        local=True,
    ),
}

ROBUST_TABLE: dict[str, str] = {
    "none": "every accepted update counts by its cases, none for more than half",
    "clipped": "no update changes more in a round than the median one",
    "krum": "only the update nearest to its neighbours counts",
    "multi-krum": "the bad-sites updates farthest from their neighbours are left out",
    "geometric-median": "updates count less the farther they are from the middle",
    "median": "the median of each value; where a change is a plain sum of arrays",
    "trimmed-mean": "the mean of each value without the bad-sites largest and smallest ones; there",
}


# Rules that bear a number of bad sites, and need as many good ones for that.
# These take each value by itself, over all sites.
COORDINATE_RULES = ("median", "trimmed-mean")
BOUNDED_RULES = ("krum", "multi-krum", "geometric-median", *COORDINATE_RULES)


def round_rule(strategy: str, number: int) -> RoundRule:
    """Return what moves in round ``number``, 1 first."""
    rules = STRATEGY_TABLE[strategy]
    return rules.odd if number % 2 else rules.even


def least_sites(robust: str, bad_sites: int) -> int:
    """Return how many updates a robust rule needs to bear ``bad_sites`` bad ones.

    Source:
        Krum, https://arxiv.org/abs/1703.02757: n >= 2 f + 3. A median of any kind needs a
        majority, n >= 2 f + 1; clipping has no such bound and needs two to compare.
    """
    match robust:
        case "krum" | "multi-krum":
            return 2 * bad_sites + 3
        case "geometric-median" | "median" | "trimmed-mean":
            return 2 * bad_sites + 1
        case "clipped":
            return 2
    return 1


def bad_left(robust: str, bad_sites: int, updates: int, refused: int) -> int | None:
    """Return how many bad ones a robust rule reckons with among the updates of a round.

    ``bad_sites`` counts every site whose update is bad, for whatever reason. One whose update the
    gate refused was one of them, and is gone: among the others there is one less. A site that
    gave no answer may be a good one, so it lowers nothing. The rule bears as many of the bad ones
    as the updates allow, and never fewer than may be left.

    Args:
        robust: A name of the table.
        bad_sites: Bad sites that it shall bear.
        updates: Usable updates.
        refused: Updates that the gate refused.

    Returns:
        The number, or None if the updates are too few to bear what may be left.
    """
    fewest = max(bad_sites - refused, 0)
    for left in range(bad_sites, fewest - 1, -1):
        if updates >= least_sites(robust, left):
            return left
    return None


def updates_suffice(
    robust: str, bad_sites: int, min_sites: int, updates: int, refused: int
) -> bool:
    """Return whether a round may close; see ``bad_left`` for the arguments.

    Bad sites are among the ``min_sites`` that a rule with a bound on them needs, so a refused one
    counts there. With the other rules it counts nowhere.
    """
    counted = updates + (min(refused, bad_sites) if robust in BOUNDED_RULES else 0)
    return counted >= min_sites and bad_left(robust, bad_sites, updates, refused) is not None


def check_late(strategy: str, late: str) -> None:
    """Refuse to use late updates where those of two rounds cannot be combined.

    Raises:
        SettingsError: In words, why not and what to take.
    """
    if late == "use" and not STRATEGY_TABLE[strategy].late:
        msg = (
            f"strategy {strategy!r} moves another factor in each round, so a late update does not "
            "fit the next one; take late 'drop', or strategy 'frozen-a'"
        )
        raise SettingsError(msg)


def check_combination(
    strategy: str, robust: str, bad_sites: int, min_sites: int, pairs: bool
) -> None:
    """Refuse what does not combine, and name the way out.

    Args:
        strategy: A name of the table.
        robust: A name of its table.
        bad_sites: Bad sites that a robust rule shall bear.
        min_sites: Updates without which there is no round.
        pairs: Whether the method trains low-rank pairs.

    Raises:
        SettingsError: In words, what does not go together and what to take.
    """
    for kind, name, table in (
        ("strategy", strategy, STRATEGY_TABLE),
        ("robust", robust, ROBUST_TABLE),
    ):
        if name not in table:
            msg = f"{kind}: expected one of {', '.join(table)}, got {name!r}"
            raise SettingsError(msg)
    rules = STRATEGY_TABLE[strategy]
    if rules.pairs == "never" and pairs:
        other = "frozen-a" if robust in COORDINATE_RULES else "product"
        msg = (
            f"strategy {strategy!r} averages whole arrays, and the method trains low-rank pairs; "
            f"take strategy {other!r}, or a method without 'lora'"
        )
        raise SettingsError(msg)
    if rules.pairs == "always" and not pairs:
        msg = (
            f"strategy {strategy!r} is for low-rank pairs, and the method trains none; "
            "take strategy 'fedavg', or method 'lora'"
        )
        raise SettingsError(msg)
    if robust in COORDINATE_RULES and not rules.sums:
        msg = (
            f"robust {robust!r} takes each value by itself, and with strategy {strategy!r} a value "
            "does not mean the same at all sites; take robust 'geometric-median', or strategy "
            "'frozen-a', or 'fedavg' with a method without 'lora'"
        )
        raise SettingsError(msg)
    if min_sites < (least := least_sites(robust, bad_sites)):
        msg = (
            f"robust {robust!r} needs {least} updates to bear {bad_sites} bad ones, and rounds of "
            f"{min_sites} would count; raise min-sites to {least}, or take fewer bad-sites"
        )
        raise SettingsError(msg)


def check_optimisation(strategy: str, server_optimiser: str, proximal: float) -> None:
    """Refuse optimisers and terms that a strategy does not allow, and name the way out.

    Raises:
        SettingsError: In words, what does not go together and what to take.
    """
    rules = STRATEGY_TABLE[strategy]
    if server_optimiser != "none" and not rules.sums:
        msg = (
            f"server-optimiser {server_optimiser!r} needs changes that are plain sums of arrays, "
            f"and those of strategy {strategy!r} are not; take server-optimiser 'none', or "
            "strategy 'frozen-a', or 'fedavg' with a method without 'lora'"
        )
        raise SettingsError(msg)
    if proximal and not rules.proximal:
        msg = (
            f"proximal holds sites to a state that all of them have, and with strategy "
            f"{strategy!r} a part of it is each site's own; take proximal 0, or strategy 'product'"
        )
        raise SettingsError(msg)
