"""What a benchmark's figures say of persons that were not looked at: intervals and tests.

The unit is the person: slices and labels of one person hang together, and so do the seeds of
one arm. An interval of a mean resamples persons and seeds, each by itself; a test takes the mean
over seeds of each person.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap, wilcoxon

from dafne_federated.core.errors import DataError
from dafne_federated.simulations.benchmark_cells import person_means
from dafne_federated.simulations.benchmark_records import FitLine, TestLine

Line = FitLine | TestLine
Matrix = npt.NDArray[np.float64]

LEVEL = 0.95
_RESAMPLES = 9999
_SEED = 1  # of the resampling, so that the same figures give the same interval
_FEWEST = 6  # persons; with fewer no two-sided signed-rank test can fall below 0.05


@dataclass(frozen=True)
class Interval:
    """A mean with the range in which it lies, by resampling.

    Attributes:
        mean: The mean.
        low: Lower end; None where there are too few persons to resample.
        high: Upper end.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """An arm against a reference, on the same persons.

    Attributes:
        gain: Mean difference, with its interval.
        better: Persons whose Dice is higher.
        persons: Persons that were compared.
        p: Two-sided Wilcoxon signed-rank test over persons; None without a test.
        adjusted: ``p`` after Holm's correction for the comparisons that were made together.
    """

    gain: Interval
    better: int
    persons: int
    p: float | None
    adjusted: float | None = None


def dice_matrix(lines: Sequence[Line], held_out: bool = False) -> tuple[list[str], Matrix]:
    """Return persons, and their Dice (persons, seeds), mean over labels.

    Raises:
        DataError: Not all seeds measured the same persons.
    """
    columns = []
    for line in sorted(lines, key=lambda line: line.seed):
        scores = [score for score in line.scores if score.held_out is held_out]
        columns.append(person_means(scores))
    persons = sorted(columns[0]) if columns else []
    if any(sorted(column) != persons for column in columns):
        msg = "expected the same persons for all seeds of an arm, got others"
        raise DataError(msg)
    values = [[column[person] for column in columns] for person in persons]
    return persons, np.array(values, np.float64).reshape(len(persons), len(columns))


def interval(values: Matrix) -> Interval | None:
    """Return the mean of (persons, seeds), resampled over both; None where it is empty.

    Source:
        Percentile bootstrap, ``scipy.stats.bootstrap``, persons and seeds as two samples that
        are drawn independently.
    """
    if not values.size:
        return None
    persons, seeds = values.shape
    mean = float(values.mean())
    if persons < 2:
        return Interval(mean, None, None)

    def resampled(rows: Matrix, columns: Matrix, axis: int = -1) -> Matrix:
        chosen = rows[..., :, np.newaxis].astype(int), columns[..., np.newaxis, :].astype(int)
        found: Matrix = values[chosen].mean(axis=(-2, -1))
        return found

    # A single seed stands for itself: it is drawn twice and always the same.
    columns = np.arange(seeds) if seeds > 1 else np.zeros(2)
    found = bootstrap(
        (np.arange(persons, dtype=float), columns.astype(float)),
        resampled,
        n_resamples=_RESAMPLES,
        batch=1000,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def difference(
    lines: Sequence[Line],
    reference: Sequence[Line],
    held_out: bool = False,
    descriptive: bool = False,
) -> Difference | None:
    """Return an arm against a reference on the persons that both measured; None without any.

    Args:
        lines: Of the arm, one for each seed.
        reference: Of the reference.
        held_out: Whether persons of a site that took no part are compared.
        descriptive: Whether there is to be no test.
    """
    persons, own = dice_matrix(lines, held_out)
    others, theirs = dice_matrix(reference, held_out)
    if not persons or persons != others:
        return None
    if own.shape == theirs.shape:
        changes = own - theirs  # seed by seed: both saw the same order of slices
    else:
        changes = (own.mean(axis=1) - theirs.mean(axis=1))[:, np.newaxis]
    gain = interval(changes)
    assert gain is not None  # there are persons
    each = changes.mean(axis=1)
    p = None
    if not descriptive and len(persons) >= _FEWEST and np.any(each != 0):
        p = float(wilcoxon(each).pvalue)
    return Difference(gain, int((each > 0).sum()), len(persons), p)


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return p values after Holm's correction for those that are compared together.

    Source:
        S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    known = sorted((p, name) for name, p in values.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        found[name] = largest
    return found
