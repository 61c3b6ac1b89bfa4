"""How Dice changed in the same persons: sums by label, which name nobody.

The validation persons of a site have two offices that no person has both of: some choose which
round is best, the others say whether that one may be released. Else the best of many rounds would
be judged by the very persons in whom it happened to look best.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field
from scipy.special import stdtrit

from dafne_federated.core.errors import StateError
from dafne_federated.core.files import sha256
from dafne_federated.core.metrics import Agreement, judged, mean

_ROUNDING = 1e-9  # of float64 sums


class PairedChange(BaseModel):
    """By how much the Dice of one label changed in some persons, base and then adapted.

    Attributes:
        persons: How many.
        total: Sum of their differences; a person's is the mean over that person's cases.
        squares: Sum of the squares of these differences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    persons: int = Field(ge=1)
    total: float
    squares: float = Field(ge=0)

    @property
    def mean(self) -> float:
        """Mean difference."""
        return self.total / self.persons

    def lower(self, confidence: float) -> float:
        """Return the lower end of the one-sided interval of the mean difference; two persons up.

        Source:
            Student's t for paired differences, with ``persons - 1`` degrees of freedom; the
            quantile is ``scipy.special.stdtrit``.
        """
        free = self.persons - 1
        variance = max(self.squares - self.total**2 / self.persons, 0.0) / free
        quantile = float(stdtrit(free, confidence))
        return self.mean - quantile * math.sqrt(variance / self.persons)


Changes = dict[str, PairedChange]  # by label
Parts = tuple[Changes, Changes]  # in those who choose, and in those who accept


def together(parts: Iterable[PairedChange]) -> PairedChange:
    """Return the change in all persons of ``parts``, of which there is at least one."""
    known = list(parts)
    return PairedChange(
        persons=sum(part.persons for part in known),
        total=math.fsum(part.total for part in known),
        squares=math.fsum(part.squares for part in known),
    )


def mean_change(changes: Mapping[str, Changes]) -> float | None:
    """Return the mean over sites of each site's mean over labels, or None without any person."""
    return mean([mean([c.mean for c in labels.values()]) for labels in changes.values()])


def accepting(persons: Iterable[str]) -> frozenset[str]:
    """Return who of a site's validation persons accepts; the others choose.

    Every other one in the order of the hashes of their names, so that it is the same in every
    round and run; of an odd number, a single one included, more accept than choose.
    """
    ordered = sorted(set(persons), key=lambda person: (sha256(person.encode()), person))
    return frozenset(ordered[::2])


def paired_changes(
    before: Sequence[Agreement],
    after: Sequence[Agreement],
    persons: Mapping[str, str],
    accepts: Collection[str] | None = None,
) -> Parts:
    """Return how the persons that choose changed, and how those that accept did.

    Args:
        before: Agreement with the base, or with another state.
        after: Agreement of the same cases with another state.
        persons: Whose each case is, by its name.
        accepts: Who accepts; by default as ``accepting`` says.
    """
    first = {(row.case, row.label): row.dice for row in judged(before)}
    accepts = accepting(persons.values()) if accepts is None else accepts
    found: dict[tuple[str, bool], dict[str, list[float]]] = {}
    for row in judged(after):
        old = first.get((row.case, row.label))
        if old is not None and row.dice is not None:
            person = persons[row.case]
            own = found.setdefault((row.label, person in accepts), {})
            own.setdefault(person, []).append(row.dice - old)
    parts: Parts = {}, {}
    for (label, accepts_here), of_persons in found.items():
        values = [math.fsum(own) / len(own) for _, own in sorted(of_persons.items())]
        parts[accepts_here][label] = PairedChange(
            persons=len(values),
            total=math.fsum(values),
            squares=math.fsum(value**2 for value in values),
        )
    return parts


def change_fields(labels: Sequence[str], *compared: Parts) -> dict[str, object]:
    """Return what travels: numbers for each label, first of those who choose; see ``told``.

    Args:
        labels: Those of the plan.
        compared: The changes from each state that was compared with, of the same persons.
    """
    cells = [part.get(label) for parts in compared for part in parts for label in labels]
    return {
        "change_persons": [cell.persons if cell else 0 for cell in cells],
        "change_total": [cell.total if cell else 0.0 for cell in cells],
        "change_squares": [cell.squares if cell else 0.0 for cell in cells],
    }


def told(
    labels: Sequence[str],
    persons: Sequence[int],
    total: Sequence[float],
    squares: Sequence[float],
    states: int = 1,
) -> list[Parts]:
    """Return what a site said of those who choose and of those who accept; nothing is fine, too.

    Args:
        labels: Those of the plan.
        persons: See ``change_fields``; so are the other two.
        total: Sums of differences.
        squares: Sums of their squares.
        states: How many states the site compared with.

    Raises:
        StateError: These cannot be counts and sums of differences of Dice, or not of the same
            persons for each state.
    """
    size, each = len(persons), 2 * len(labels)
    if size != len(total) or size != len(squares) or size not in (0, states * each):
        msg = f"change: expected {states * each} counts and sums, got {size}"
        raise StateError(msg)
    if list(persons) != list(persons[:each]) * (size // each):
        msg = "change: expected the same numbers of persons for each state, got others"
        raise StateError(msg)
    found: list[Parts] = [({}, {}) for _ in range(states)]
    for index in (i for i in range(size) if persons[i]):
        count, own, square = persons[index], total[index], squares[index]
        if not own**2 / count - _ROUNDING <= square <= count + _ROUNDING:
            msg = f"change: expected sums of {count} differences of Dice, got {own:g}, {square:g}"
            raise StateError(msg)
        state, (part, label) = index // each, divmod(index % each, len(labels))
        change = PairedChange(persons=count, total=own, squares=square)
        found[state][part][labels[label]] = change
    return found
