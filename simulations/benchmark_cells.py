"""The grid of a benchmark: which fits there are, and which choice of settings is made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dafne_federated.core.files import sha256
from dafne_federated.core.metrics import mean
from dafne_federated.simulations.benchmark_records import FitLine, Score
from dafne_federated.simulations.benchmark_scenario import Scenario

# Raise when a fit or its figures come about in another way, so that old ones are not taken.
_VERSION = 2
_FEDERATED_VERSION = 2  # the same for fits of federated arms alone


@dataclass(frozen=True)
class Group:
    """All fits of one arm at one size in one fold: among them settings are chosen.

    Attributes:
        arm: Name of the arm.
        persons: Persons per site, 0 for all.
        fold: Number of the fold.
    """

    arm: str
    persons: int
    fold: int


@dataclass(frozen=True)
class Cell:
    """One fit.

    Attributes:
        group: What it belongs to.
        variant: Number of the variant of the arm.
        seed: Seed of the fit.
    """

    group: Group
    variant: int
    seed: int


def groups(scenario: Scenario) -> list[Group]:
    """Return all groups; those that need the fits of others come last."""
    found = [
        Group(name, persons, fold)
        for fold in range(len(scenario.persons.folds))
        for persons in scenario.sites.persons
        for name, arm in scenario.arms.items()
        # Nobody trains: there is one size only.
        if arm.where != "base" or persons == scenario.sites.persons[0]
    ]
    return sorted(found, key=lambda group: scenario.arms[group.arm].where == "ensemble")


def first_cells(scenario: Scenario, group: Group) -> list[Cell]:
    """Return the fits that a choice is made from: all variants, with the first seed."""
    variants = range(len(scenario.arms[group.arm].variants))
    return [Cell(group, variant, scenario.seeds[0]) for variant in variants]


def other_cells(scenario: Scenario, group: Group, variant: int) -> list[Cell]:
    """Return the fits of the other seeds with the variant that was chosen."""
    if scenario.arms[group.arm].where == "base":
        return []
    return [Cell(group, variant, seed) for seed in scenario.seeds[1:]]


def cell_count(scenario: Scenario, group: Group) -> int:
    """Return how many fits a group has."""
    return len(first_cells(scenario, group)) + len(other_cells(scenario, group, 0))


def cell_key(scenario: Scenario, cell: Cell, data_digest: str) -> str:
    """Return a digest of everything that acts on a fit, 16 hexadecimal digits.

    Arms that are not concerned, the question, and other seeds and sizes are left out: adding
    some leaves finished fits finished. Versions of software stand in each line instead.

    Args:
        scenario: The scenario.
        cell: The fit.
        data_digest: Digest of the images.
    """
    whole = scenario.model_dump(mode="json", by_alias=True)
    arm = scenario.arms[cell.group.arm]
    fold = scenario.persons.folds[cell.group.fold]
    sites = {**whole["sites"], "persons": cell.group.persons}
    persons = {**whole["persons"], "folds": fold.model_dump(mode="json")}
    parts: list[Any] = [_VERSION, data_digest, sites, persons, whole["network"]]
    parts += [scenario.division, scenario.every_nth_slice]
    parts += [{**arm.settings, **arm.variants[cell.variant]}, arm.where, arm.trains, arm.with_base]
    if arm.of:
        other = scenario.arms[arm.of]
        parts += [other.settings, list(other.variants), other.trains]
    if arm.where == "federated":
        parts.append(_FEDERATED_VERSION)
    parts.append(cell.seed)
    return sha256(json.dumps(parts, sort_keys=True).encode())[:16]


def chosen_variant(lines: Sequence[FitLine]) -> FitLine:
    """Return the fit with the best mean Dice of the tuning persons, the first among equals.

    Where there are no tuning persons it is that with the best validation Dice.
    """

    def figure(line: FitLine) -> float:
        if line.scores:
            return mean(list(person_means(line.scores).values())) or 0.0
        return line.curve[line.kept].dice or 0.0 if line.curve and line.kept >= 0 else 0.0

    return max(lines, key=figure)


def chosen_cells(scenario: Scenario, group: Group, first: Sequence[FitLine]) -> list[Cell]:
    """Return the fits of all seeds with the variant that is chosen.

    Args:
        scenario: The scenario.
        group: The group.
        first: The lines of ``first_cells``, in that order.
    """
    best = first.index(chosen_variant(first))
    return [first_cells(scenario, group)[best], *other_cells(scenario, group, best)]


def person_means(scores: Sequence[Score]) -> Mapping[str, float]:
    """Return the Dice of each person: the mean over labels of the mean over scans."""
    found = {}
    for person in sorted({score.person for score in scores}):
        own = [score for score in scores if score.person == person]
        labels = sorted({score.label for score in own})
        by_label = [mean([s.dice for s in own if s.label == label]) for label in labels]
        found[person] = mean(by_label) or 0.0
    return found
