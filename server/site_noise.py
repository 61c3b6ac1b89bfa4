"""Noise that hides each site: added once a round to the mean change, by the server.

Two runs are neighbours if in one of them one site changes nothing in any round; that it took part
is not hidden. A round moves the mean by at most ``clip / m`` for one of m updates
(``strategies/site_privacy.py``), and the noise has ``noise`` times that as standard deviation in
each value that moves. Every round counts for every site. What is made of the mean afterwards
costs nothing more.

The noise follows from a key of the run that nobody else has, and from the bits that it is added
to: a round that is asked again with other answers gets other noise, and one with the same answers
the same. It is not drawn by Flower's ``add_gaussian_noise_inplace``, which takes it from numpy's
global Mersenne Twister: arrays in which no site changed anything show their noise as it is, and
the state of that generator can be worked out from it.

Source:
    DP-FedAvg, https://arxiv.org/abs/1710.06963, with every site in every round.
"""

import hmac
import secrets

import numpy as np
from flwr.supercore.differential_privacy import compute_stdv

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import arrays_digest, write_atomic
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.privacy_accountant import Spent, epsilon_of
from dafne_federated.core.run_folder import RoundLine, RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, moving_arrays
from dafne_federated.core.strategy_table import round_rule
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.site_privacy import bounded

KEY_BYTES = 32

# Below one over the number of sites for up to 100 000 of them.
DELTA = 1e-5


def require_site_noise(folder: RunFolder, settings: RunSettings) -> None:
    """See to it, before anybody trains, that sites can be hidden: the accountant and a key.

    The key is made at the start of a run; only its owner can read it, and it is in no release.

    Raises:
        SettingsError: The accountant is not installed.
        RunError: The key of a run that goes on is gone or damaged.
    """
    if settings.privacy != "site":
        return
    site_epsilon(settings, 1)
    if not folder.rounds() and not folder.noise_key.exists():
        write_atomic(folder.noise_key, secrets.token_bytes(KEY_BYTES), private=True)
    _key(folder)


def bounded_updates(
    settings: RunSettings, plan: AdaptationPlan, number: int, sent: State, updates: list[Update]
) -> list[Update]:
    """Return the updates with the shares that ``clip`` leaves them; as they are without privacy."""
    if settings.privacy != "site":
        return updates
    moving = moving_arrays(plan, sent, round_rule(settings.strategy, number).held)
    return bounded(updates, sent, moving, settings.clip)


def with_site_noise(
    folder: RunFolder,
    settings: RunSettings,
    plan: AdaptationPlan,
    number: int,
    sent: State,
    mean: State,
    count: int,
) -> State:
    """Return the mean of a round with noise on all that moved; as it is without privacy.

    Args:
        folder: Where the key lies.
        settings: Those of the run.
        plan: What is trained.
        number: The round.
        sent: The state that the sites were sent.
        mean: The mean of the updates that ``bounded_updates`` returned.
        count: How many updates it was.

    Raises:
        RunError: The key is gone or damaged.
    """
    if settings.privacy != "site":
        return mean
    deviation = compute_stdv(settings.noise, settings.clip, count)
    # Without the name of the run: the key is of this run alone.
    content = [number, arrays_digest(sent), arrays_digest(mean), float(deviation).hex()]
    seed = hmac.digest(_key(folder), "\n".join(map(str, content)).encode(), "sha256")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(int.from_bytes(seed))))
    noisy = dict(mean)
    for name in moving_arrays(plan, sent, round_rule(settings.strategy, number).held):
        noise = generator.normal(0.0, deviation, mean[name].shape)
        noisy[name] = (mean[name] + noise).astype(np.float32)
    return noisy


def with_site_epsilon(line: RoundLine, settings: RunSettings) -> RoundLine:
    """Return the line of a round with what the run cost each site so far, if sites are hidden."""
    if settings.privacy != "site":
        return line
    epsilon = site_epsilon(settings, min(line.round, settings.rounds))
    return line.model_copy(update={"epsilon": epsilon, "delta": DELTA, "unit": "site"})


def site_epsilon(settings: RunSettings, rounds: int) -> float:
    """Return the epsilon of so many rounds for one site, an upper bound at ``DELTA``.

    Raises:
        SettingsError: The accountant is not installed.
    """
    return epsilon_of([Spent(settings.noise, 1.0, rounds)], DELTA)


def _key(folder: RunFolder) -> bytes:
    key = folder.noise_key.read_bytes() if folder.noise_key.exists() else b""
    if len(key) != KEY_BYTES:
        msg = (
            f"{folder.noise_key}: expected the {KEY_BYTES} bytes that the noise follows from, got "
            f"{len(key)}; restore the file, or start a new run"
        )
        raise RunError(msg)
    return key
