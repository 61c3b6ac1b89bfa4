"""What goes with the noise that hides persons or sites; every refusal names the way out."""

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.strategy_table import STRATEGY_TABLE, OptimiserChoice


def check_person_privacy(pooled: bool, optimiser: OptimiserChoice, proximal: float) -> None:
    """Refuse what does not go with the noise that hides persons.

    Args:
        pooled: Whether sites pool statistics or class frequencies.
        optimiser: That of the sites.
        proximal: That setting of the run.

    Raises:
        SettingsError: In words, and what to take.
    """
    if pooled:
        raise SettingsError(_POOLED.format("person", "persons"))
    if optimiser != "fresh" or proximal:
        msg = (
            "private steps start with a fresh optimiser and have no proximal term; take "
            "optimiser 'fresh' and proximal 0, or privacy 'none'"
        )
        raise SettingsError(msg)


def check_site_privacy(
    pooled: bool, strategy: str, robust: str, sites_per_round: int, late: str
) -> None:
    """Refuse what does not go with the noise that hides sites.

    How a site trains does not matter, and neither does a server optimiser, which sees the mean
    after the noise.

    Args:
        pooled: Whether sites pool statistics or class frequencies.
        strategy: A name of its table.
        robust: A name of its table.
        sites_per_round: That setting of the run.
        late: That setting of the run.

    Raises:
        SettingsError: In words, and what to take.
    """
    if pooled:
        raise SettingsError(_POOLED.format("site", "sites"))
    if not STRATEGY_TABLE[strategy].sums:
        msg = (
            "privacy 'site' needs changes that are plain sums of arrays, and those of strategy "
            f"{strategy!r} are not; take strategy 'frozen-a', or 'fedavg' with a method without "
            "'lora', or privacy 'none'"
        )
        raise SettingsError(msg)
    if robust != "none":
        msg = (
            f"robust {robust!r} weighs each update by what the others are, so that one site could "
            "change what another counts, which privacy 'site' does not cover; take robust 'none' "
            "(each change is clipped), or privacy 'none'"
        )
        raise SettingsError(msg)
    if sites_per_round:
        msg = (
            "privacy 'site' counts every round for every site and claims nothing from a draw of "
            "sites; take sites-per-round 0, or privacy 'none'"
        )
        raise SettingsError(msg)
    if late != "drop":
        msg = (
            "privacy 'site' bounds what a site changes in the round that it was asked in, and a "
            "late update is of the round before; take late 'drop', or privacy 'none'"
        )
        raise SettingsError(msg)


_POOLED = (
    "privacy {0!r} does not cover what sites pool over all their {1}; take "
    "statistics 'base' and class-weights 'case', or privacy 'none'"
)
