"""What was spent of the privacy of persons: epsilon of noisy training steps, composed.

Two sets of data are neighbours if one holds one person more than the other, with all of that
person's images. The bound is computed by Google's accountant; nothing of it is derived here.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dafne_federated.core.errors import SettingsError

UNIT = "person"
NEIGHBOURS = "one person, with all images of that person, is added or left out"

# Below this the discretised distribution of the loss needs minutes and gigabytes, for an
# epsilon in the hundreds that protects nobody.
LEAST_NOISE = 0.3

# An epoch has 1 / rate steps, and whoever asks for them is not who makes them.
LEAST_RATE = 0.001


@dataclass(frozen=True)
class Mechanism:
    """How each step hides a person.

    Attributes:
        noise: Standard deviation of the Gaussian noise, as a multiple of ``clip``.
        clip: The largest L2 norm of what one person adds to a step.
        rate: Probability with which a person takes part in a step, each by itself.
    """

    noise: float
    clip: float
    rate: float

    def steps(self, epochs: int) -> int:
        """Return the steps in which a person takes part ``epochs`` times on average."""
        return max(1, round(epochs / self.rate))


@dataclass(frozen=True)
class Spent:
    """Steps of one mechanism; ``clip`` does not matter for what they cost."""

    noise: float
    rate: float
    steps: int


def epsilon_of(spent: Iterable[Spent], delta: float) -> float:
    """Return the epsilon of all steps together, an upper bound.

    Args:
        spent: Steps in any order; from one run or from many on the same persons.
        delta: Of the same guarantee.

    Raises:
        SettingsError: The package of the accountant is not installed.

    Source:
        Poisson sampled Gaussians composed by privacy loss distributions,
        https://arxiv.org/abs/2207.04380, as in the
        package dp-accounting.
    """
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError:
        msg = (
            "the accountant of privacy is not installed, and without it nothing is trained with "
            "noise; install it with: pip install 'dafne-federated[privacy]'"
        )
        raise SettingsError(msg) from None
    together: Counter[tuple[float, float]] = Counter()
    for part in spent:
        together[part.noise, part.rate] += part.steps
    if not together:
        return 0.0
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(relation)
    for (noise, rate), steps in sorted(together.items()):
        gaussian = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))
