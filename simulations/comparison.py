"""Base, local only and federated side by side: the same persons, by site and label."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dafne_federated.core.metrics import mean
from dafne_federated.simulations.test_results import EVERY_ARM, TestRow

Person = tuple[str, str]  # site, person
_Key = tuple[str, str, str, str]  # site, person, case, label
_Rows = Mapping[str, Sequence[TestRow]]  # by arm; several where several models stand for one
_Paired = dict[_Key, dict[str, list[TestRow]]]


@dataclass(frozen=True)
class ArmMeans:
    """Means of one arm; None where there is nothing to average.

    Attributes:
        dice: Mean Dice.
        hd95: Mean HD95 in mm, over cases in which every arm drew the label.
        volume_size: Mean size of the volume error without its sign, in percent.
        volume_bias: Mean volume error with its sign, in percent.
    """

    dice: float | None
    hd95: float | None
    volume_size: float | None
    volume_bias: float | None


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        site: Name of the site; empty for all sites.
        label: Name of the label; empty for all labels.
        persons: Persons behind the Dice.
        distance_persons: Persons behind the HD95.
        means: By arm.
    """

    site: str
    label: str
    persons: int
    distance_persons: int
    means: dict[str, ArmMeans]

    def dice(self, arm: str) -> float | None:
        """Return the mean Dice of ``arm``, or None."""
        return self.means[arm].dice if arm in self.means else None

    def gain(self, arm: str) -> float | None:
        """Return by how much the Dice of ``arm`` is above the base's, or None."""
        own, base = self.dice(arm), self.dice("base")
        return None if own is None or base is None else own - base


@dataclass(frozen=True)
class EmptyMasks:
    """How often an arm drew nothing where there was something, and the reverse.

    Attributes:
        label: Name of the label.
        present: By arm, how often the truth held the label.
        absent: By arm, how often it did not.
        missed: By arm, how often the label was there and the arm drew nothing.
        invented: By arm, how often it was not there and the arm drew it.
    """

    label: str
    present: dict[str, int]
    absent: dict[str, int]
    missed: dict[str, int]
    invented: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """All arms on the same persons.

    Attributes:
        arms: The arms that were tested, in the order of ``EVERY_ARM``.
        labels: The labels that were tested, in the order of the plan.
        lines: By site, one line per label.
        site_lines: By site, the mean over its labels.
        total: The mean over sites; an arm that was not tested at every site has none.
        empty: One entry per label that was ever missed, absent or invented.
        unpaired: Measurements left out because not every arm of the site has them.
        several: Whether some person was measured with the local models of several sites.
        persons: Mean Dice over labels, by person and arm.
    """

    arms: tuple[str, ...]
    labels: tuple[str, ...]
    lines: dict[str, tuple[Line, ...]]
    site_lines: dict[str, Line]
    total: Line
    empty: tuple[EmptyMasks, ...]
    unpaired: int
    several: bool
    persons: dict[Person, dict[str, float]]


def compare(rows: Sequence[TestRow], labels: Sequence[str]) -> Comparison:
    """Compare the arms.

    A person's cases are averaged first, then persons, then labels, then sites, so that a
    person with two scans and a site with many persons count no more than others. Dice and
    volume error run over cases in which the truth holds the label, HD95 over those in which
    moreover every arm drew it: all arms are averaged over the same cases.

    Args:
        rows: What was measured.
        labels: Label names in the order in which to show them; others follow by name.
    """
    arms = tuple(arm for arm in EVERY_ARM if any(row.arm == arm for row in rows))
    names = {row.label for row in rows}
    ordered = (*(n for n in labels if n in names), *sorted(names - set(labels)))
    paired, unpaired = _paired(rows)
    present = {key: arms_of for key, arms_of in paired.items() if _in_truth(arms_of)}
    lines: dict[str, tuple[Line, ...]] = {}
    site_lines: dict[str, Line] = {}
    for site in sorted({key[0] for key in paired}):
        cases = {
            label: {k: v for k, v in present.items() if k[0] == site and k[3] == label}
            for label in ordered
        }
        lines[site] = tuple(_line(site, label, cases[label]) for label in ordered if cases[label])
        found = {key: v for by_key in cases.values() for key, v in by_key.items()}
        site_lines[site] = _mean_line(site, lines[site], _count(found), _count(_drawn(found)))
    total = _mean_line(
        "",
        [line for line in site_lines.values() if line.means],
        sum(line.persons for line in site_lines.values()),
        sum(line.distance_persons for line in site_lines.values()),
    )
    return Comparison(
        arms=arms,
        labels=ordered,
        lines=lines,
        site_lines=site_lines,
        total=total,
        empty=tuple(_empty_masks(paired, ordered, arms)),
        unpaired=unpaired,
        several=any(len(rows) > 1 for by_arm in paired.values() for rows in by_arm.values()),
        persons=_persons(present),
    )


def persons_to_show(rows: Sequence[TestRow], arm: str = "federated") -> dict[Person, str]:
    """Return the persons with the lowest, the median and the highest Dice, each with that word.

    With fewer than three persons the list is shorter. Of two persons in the middle the lower
    one is taken, of equal ones the first by name.
    """
    scores = compare(rows, ()).persons
    ranked = sorted((means[arm], person) for person, means in scores.items() if arm in means)
    if not ranked:
        return {}
    last = len(ranked) - 1
    if last == 0:
        return {ranked[0][1]: "only"}
    places = {last // 2: "median", last: "highest", 0: "lowest"}  # of two, none is the median
    return {ranked[place][1]: places[place] for place in sorted(places)}


def _paired(rows: Iterable[TestRow]) -> tuple[_Paired, int]:
    """Return the measurements that every arm of their site has, and how many others there are."""
    found: _Paired = {}
    for row in rows:
        key = row.site, row.person, row.case, row.label
        found.setdefault(key, {}).setdefault(row.arm, []).append(row)
    arms: dict[str, set[str]] = {}
    for key, by_arm in found.items():
        arms.setdefault(key[0], set()).update(by_arm)
    kept = {k: found[k] for k in sorted(found) if found[k].keys() == arms[k[0]]}
    return kept, len(found) - len(kept)


def _in_truth(by_arm: _Rows) -> bool:
    return all(row.volume_error is not None for rows in by_arm.values() for row in rows)


def _drawn(paired: _Paired) -> _Paired:
    """Return the measurements in which every arm has a distance."""
    return {
        key: by_arm
        for key, by_arm in paired.items()
        if all(row.hd95 is not None for rows in by_arm.values() for row in rows)
    }


def _line(site: str, label: str, cases: _Paired) -> Line:
    drawn = _drawn(cases)
    means: dict[str, ArmMeans] = {}
    for arm in next(iter(cases.values())):
        errors = {key: [row.volume_error for row in v[arm]] for key, v in cases.items()}
        sizes = {key: [None if e is None else abs(e) for e in v] for key, v in errors.items()}
        means[arm] = ArmMeans(
            dice=_over_persons({key: [row.dice for row in v[arm]] for key, v in cases.items()}),
            hd95=_over_persons({key: [row.hd95 for row in v[arm]] for key, v in drawn.items()}),
            volume_size=_over_persons(sizes),
            volume_bias=_over_persons(errors),
        )
    return Line(site, label, _count(cases), _count(drawn), means)


def _over_persons(values: Mapping[_Key, Sequence[float | None]]) -> float | None:
    by_person: dict[Person, list[float | None]] = {}
    for key in sorted(values):
        by_person.setdefault(key[:2], []).append(mean(values[key]))
    return mean([mean(own) for own in by_person.values()])


def _mean_line(site: str, lines: Sequence[Line], persons: int, distance_persons: int) -> Line:
    """Return the mean over lines, of the arms that all of them have."""
    shared = [arm for arm in EVERY_ARM if lines and all(arm in line.means for line in lines)]
    means = {
        arm: ArmMeans(
            dice=mean([line.means[arm].dice for line in lines]),
            hd95=mean([line.means[arm].hd95 for line in lines]),
            volume_size=mean([line.means[arm].volume_size for line in lines]),
            volume_bias=mean([line.means[arm].volume_bias for line in lines]),
        )
        for arm in shared
    }
    return Line(site, "", persons, distance_persons, means)


def _count(paired: Iterable[_Key]) -> int:
    return len({key[:2] for key in paired})


def _persons(present: _Paired) -> dict[Person, dict[str, float]]:
    scores: dict[Person, dict[str, float]] = {}
    for person, keys in itertools.groupby(sorted(present), key=lambda key: key[:2]):
        own = list(keys)
        for arm in present[own[0]]:
            by_label: dict[str, list[float | None]] = {}
            for key in own:
                by_label.setdefault(key[3], []).append(
                    mean([row.dice for row in present[key][arm]])
                )
            average = mean([mean(values) for values in by_label.values()])
            if average is not None:
                scores.setdefault(person, {})[arm] = average
    return scores


def _empty_masks(
    paired: _Paired, labels: Sequence[str], arms: Sequence[str]
) -> Iterable[EmptyMasks]:
    for label in labels:
        cases = [by_arm for key, by_arm in paired.items() if key[3] == label]
        tries = {arm: [row for by_arm in cases for row in by_arm.get(arm, ())] for arm in arms}
        present = {a: [r for r in rows if r.volume_error is not None] for a, rows in tries.items()}
        absent = {a: [r for r in rows if r.volume_error is None] for a, rows in tries.items()}
        # an empty prediction is exactly 100 % too small
        missed = {a: sum(r.volume_error == -100 for r in rows) for a, rows in present.items()}
        invented = {a: sum(r.dice is not None for r in rows) for a, rows in absent.items()}
        if any(absent.values()) or any(missed.values()):
            yield EmptyMasks(
                label=label,
                present={arm: len(rows) for arm, rows in present.items()},
                absent={arm: len(rows) for arm, rows in absent.items()},
                missed=missed,
                invented=invented,
            )
