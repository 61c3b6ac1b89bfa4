"""Privacy in a simulation: the same training, noise and accountant, with no secret in it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dafne_federated.client.privacy_ledger import PrivacyLedger
from dafne_federated.client.site_cache import SiteCache
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.files import write_atomic
from dafne_federated.core.privacy_accountant import Spent, epsilon_of
from dafne_federated.core.run_folder import RoundLine, RunFolder
from dafne_federated.core.settings import RunSettings

_UNBOUNDED = 1e9  # there is no hospital that could refuse


@dataclass(frozen=True)
class SitePrivacy:
    """What a run cost the persons of one site.

    Attributes:
        site: Its name.
        epsilon: Of the whole run, as the site last said; None if it never did.
        delta: Of that epsilon.
        steps: Noisy steps of all rounds that the site answered.
    """

    site: str
    epsilon: float | None
    delta: float | None
    steps: int


def require_accountant(settings: RunSettings) -> None:
    """Refuse a run with noise where the accountant is not installed.

    Raises:
        SettingsError: In words.
    """
    if settings.privacy != "none":
        epsilon_of([Spent(8.0, 1.0, 1)], 1e-5)


def with_simulated_privacy(site: SiteSettings, settings: RunSettings) -> SiteSettings:
    """Return a simulated site that can take part in a run with noise.

    Its key follows from the seed of the run, so that a simulation can be run again with the
    same bits; whoever knows the seed can take the noise off, and a simulation protects nobody.
    """
    if not settings.mechanism:
        return site
    key = hashlib.sha256(f"{settings.seed}/{site.name}/simulated key".encode()).digest()
    PrivacyLedger(SiteCache(site.cache).privacy, key)
    return site.model_copy(update={"max_epsilon": _UNBOUNDED})


def keep_simulated_key(folder: RunFolder, settings: RunSettings) -> None:
    """Give the server of a simulated run the key of the noise that hides sites.

    As the keys of sites it follows from the seed, so that the same bits come out again: whoever
    knows the seed can take the noise off.
    """
    if settings.privacy == "site":
        key = hashlib.sha256(f"{settings.seed}/simulated key of the server".encode()).digest()
        write_atomic(folder.noise_key, key, private=True)


def site_privacy(rounds: Sequence[RoundLine]) -> list[SitePrivacy]:
    """Return what the run cost each site's persons, sites by name."""
    found = []
    for name in sorted({name for line in rounds for name in line.sites}):
        own = [line.sites[name] for line in rounds if name in line.sites]
        told = [site for site in own if site.epsilon is not None]
        last = max(told, key=lambda site: site.epsilon or 0.0, default=None)
        found.append(
            SitePrivacy(
                site=name,
                epsilon=last.epsilon if last else None,
                delta=last.delta if last else None,
                steps=sum(site.steps or 0 for site in told),
            )
        )
    return found
