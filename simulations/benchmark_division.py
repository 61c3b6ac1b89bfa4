"""Who is where in a scenario: the base, the sites, those to choose settings on, the test."""

from collections.abc import Sequence
from dataclasses import dataclass

from dafne_federated.core.dataset import CaseRef, split_persons, split_sites
from dafne_federated.core.errors import SettingsError
from dafne_federated.simulations.benchmark_scenario import Fold, Scenario


@dataclass(frozen=True)
class SitePersons:
    """Case names of one site.

    Attributes:
        training: Of each person to train on, in the order in which they are taken.
        validation: Of those who choose its epoch or round.
    """

    training: tuple[tuple[str, ...], ...]
    validation: tuple[str, ...]

    def trained_on(self, persons: int) -> tuple[str, ...]:
        """Return the cases of so many persons, 0 for all; fewer where there are fewer."""
        return tuple(name for one in self.training[: persons or None] for name in one)


@dataclass(frozen=True)
class Division:
    """Case names by their part; no person is in two of them.

    Attributes:
        base: Who trains the base.
        sites: Who is at the sites.
        tuning: On whom settings are chosen.
        test: Who is tested at the end.
        held_out: Who is, too, from a site that took no part.
    """

    base: tuple[str, ...]
    sites: dict[str, SitePersons]
    tuning: tuple[str, ...]
    test: tuple[str, ...]
    held_out: tuple[str, ...]


def divide_persons(cases: Sequence[CaseRef], scenario: Scenario, fold: Fold) -> Division:
    """Divide the persons of a data folder, the same way each time.

    Those of the test are drawn first, so they are the same whatever else changes.

    Raises:
        SettingsError: A site is not in the data, or there are too few persons.
    """
    known, wanted, seed = {case.site for case in cases}, scenario.persons, scenario.division
    for site in (fold.held_out, fold.base_site):
        if site is not None and site not in known:
            msg = f"folds: expected sites of the data, {sorted(known)}, got {site!r}"
            raise SettingsError(msg)
    held_out = [case for case in cases if case.site == fold.held_out]
    rest = [case for case in cases if case.site != fold.held_out]
    base: list[CaseRef] = []
    if fold.base_site is not None:
        base, rest = (
            [case for case in rest if (case.site == fold.base_site) is own] for own in (True, False)
        )
        if wanted.base:
            base, _ = _off(base, wanted.base, seed, "base")
    test, rest = _off(rest, wanted.test, seed, "test")
    tuning, rest = _off(rest, wanted.tuning, seed, "tuning")
    if fold.base_site is None:
        base, rest = _off(rest, wanted.base, seed, "base")
    if not base:
        msg = "persons: expected some to train the base, or a fold with a base-site"
        raise SettingsError(msg)
    groups = split_sites(rest, scenario.sites.number, seed, scenario.sites.sizes)
    sites = {name: _site(name, group, scenario) for name, group in groups.items()}
    if unknown := sorted(set(scenario.sites.wrong_labels) - set(sites)):
        msg = f"wrong-labels: expected some of the sites {sorted(sites)}, got {unknown[0]!r}"
        raise SettingsError(msg)
    return Division(_names(base), sites, _names(tuning), _names(test), _names(held_out))


def _off(
    cases: Sequence[CaseRef], number: int, seed: int, part: str
) -> tuple[list[CaseRef], list[CaseRef]]:
    """Divide off so many persons."""
    persons = len({case.person for case in cases})
    if number > persons:
        msg = f"persons: {part}: expected at most the {persons} persons that are left, got {number}"
        raise SettingsError(msg)
    if not number:
        return [], list(cases)
    off, rest = split_persons(cases, (number, persons - number), seed)
    return off, rest


def _site(name: str, cases: Sequence[CaseRef], scenario: Scenario) -> SitePersons:
    persons = len({case.person for case in cases})
    number = scenario.sites.validation
    if persons <= number:
        msg = f"site {name!r}: expected more than {number} persons for validation, got {persons}"
        raise SettingsError(msg)
    validation, rest = _off(cases, number, scenario.division, "validation")
    training = []
    while rest:
        first, rest = _off(rest, 1, scenario.division, "training")
        training.append(_names(first))
    most = max(scenario.sites.persons)
    if most > len(training):
        msg = f"sites: persons: site {name!r} has {len(training)} to train on, got {most}"
        raise SettingsError(msg)
    return SitePersons(tuple(training), _names(validation))


def _names(cases: Sequence[CaseRef]) -> tuple[str, ...]:
    return tuple(case.name for case in cases)
