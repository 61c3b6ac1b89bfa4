"""Which sites train in a round, where not all do.

All sites measure the state in every round, whoever trains, because the gate releases no state
that a site did not measure. A site that does not train gets the whole state down and sends its
Dice up.
"""

import zlib
from collections.abc import Iterable

import numpy as np


def sampled(names: Iterable[str], count: int, seed: int, number: int) -> list[str]:
    """Return the sites that train in round ``number``, by name.

    The draw follows from the arguments alone, so a run that goes on draws the same sites. Each
    round draws anew and every site is as likely as any other.

    Args:
        names: Sites of the run, in any order.
        count: How many; 0, or at least as many as there are, for all.
        seed: Seed of the run.
        number: The round.

    Source:
        McMahan et al. 2017, https://arxiv.org/abs/1602.05629.
    """
    ordered = sorted(names)
    if not 0 < count < len(ordered):
        return ordered
    generator = np.random.default_rng(zlib.crc32(f"{seed}/sites/{number}".encode()))
    return [ordered[index] for index in sorted(generator.permutation(len(ordered))[:count])]
