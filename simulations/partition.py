"""Who is where in a simulation: persons for the base, for each site, and for the test."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dafne_federated.core.dataset import CaseRef, split_persons, split_sites
from dafne_federated.core.errors import SettingsError


@dataclass(frozen=True)
class SiteCases:
    """The cases of one site; no person is in two of the lists.

    ``without`` names labels that count as not annotated there, but for the test.
    """

    training: tuple[CaseRef, ...]
    validation: tuple[CaseRef, ...]
    test: tuple[CaseRef, ...]
    without: tuple[str, ...] = ()

    def annotated(self, labels: Sequence[str]) -> tuple[str, ...] | None:
        """Return which ``labels`` count as annotated; None for what the label table says."""
        kept = tuple(label for label in labels if label not in self.without)
        return kept if self.without else None


@dataclass(frozen=True)
class Partition:
    """A data folder divided for a simulation; no person is in two places.

    Attributes:
        base: Cases that train a base, empty where a base is given.
        sites: Cases by site name; the names can travel and are distinct as file names.
        held_out: Cases of sites that take no part, for the test.
    """

    base: tuple[CaseRef, ...]
    sites: Mapping[str, SiteCases]
    held_out: tuple[CaseRef, ...]

    def check_without(self, names: Iterable[str]) -> None:
        """Refuse labels to leave out that the data does not name, and sites without any left.

        Raises:
            SettingsError: With the site and its labels.
        """
        known = {name[:-2] if name.endswith(("_L", "_R")) else name for name in names}
        for site, cases in self.sites.items():
            if unknown := sorted(set(cases.without) - known):
                msg = f"without: site {site!r}: expected labels of the data, {sorted(known)}"
                raise SettingsError(f"{msg}, got {unknown[0]!r}")
            if known <= set(cases.without):
                msg = f"without: site {site!r}: expected a label that is left, got {sorted(known)}"
                raise SettingsError(msg)


@dataclass(frozen=True)
class PartitionSettings:
    """How to divide.

    Attributes:
        base_site: Cases of this site train the base.
        base_persons: So many persons, of any site, train the base.
        test_site: Cases of this site take no part and are only tested on.
        sites: Deal all other persons into so many sites; None takes the sites as they are.
        divide: Divide each site as it is into so many.
        sizes: Relative sizes for ``sites``, in persons.
        shares: Relative sizes of training, validation and test within a site, in persons; a
            site with a single person trains on it, and with two, one trains and one is tested.
        without: Labels by site that count as not annotated there, to see what that costs.
    """

    base_site: str | None = None
    base_persons: int | None = None
    test_site: str | None = None
    sites: int | None = None
    divide: int | None = None
    sizes: tuple[float, ...] | None = None
    shares: tuple[float, float, float] = (2.0, 1.0, 1.0)
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def divide(cases: Sequence[CaseRef], settings: PartitionSettings, seed: int) -> Partition:
    """Divide cases into base, sites and test, by person, never by slice.

    Raises:
        SettingsError: The settings contradict each other or the cases, or a person would be in
            two places.
        DataError: There are fewer persons than sites, or a case names no site.
    """
    _check(cases, settings)
    base = [case for case in cases if case.site == settings.base_site]
    held_out = [case for case in cases if case.site == settings.test_site]
    rest = sorted(set(cases) - set(base) - set(held_out), key=lambda case: case.name)
    if settings.base_persons is not None:
        persons = len({case.person for case in rest})
        if not 1 <= settings.base_persons < persons:
            msg = f"base-persons: expected 1 to {persons - 1} of {persons} persons"
            raise SettingsError(f"{msg}, got {settings.base_persons}")
        shares = (settings.base_persons, persons - settings.base_persons)
        base, rest = split_persons(rest, shares, seed)
    if not rest:
        msg = "no person is left for the sites"
        raise SettingsError(msg)
    groups = split_sites(rest, settings.sites, seed, settings.sizes)
    _check_persons([base, held_out, *groups.values()])
    if settings.divide is not None:
        groups = {
            f"{name}-{number}": part
            for name, group in groups.items()
            for number, part in enumerate(_parts(name, group, settings.divide, seed), start=1)
        }
    names = _site_names(groups, settings.test_site)
    sites = {
        names[name]: _split_site(name, group, settings, seed) for name, group in groups.items()
    }
    for name, labels in settings.without.items():
        if name not in sites:
            msg = f"without: expected one of the sites {sorted(sites)}, got {name!r}"
            raise SettingsError(msg)
        sites[name] = replace(sites[name], without=tuple(labels))
    return Partition(tuple(base), sites, tuple(held_out))


def _check(cases: Sequence[CaseRef], settings: PartitionSettings) -> None:
    known = {case.site for case in cases}
    for name in (settings.base_site, settings.test_site):
        if name is not None and name not in known:
            msg = f"expected one of the sites {sorted(known)}, got {name!r}"
            raise SettingsError(msg)
    if settings.base_site is not None and settings.base_site == settings.test_site:
        msg = f"base-site and test-site: expected two sites, got {settings.base_site!r} twice"
        raise SettingsError(f"{msg}; a base is not tested on persons that it was trained on")
    if settings.base_site is not None and settings.base_persons is not None:
        msg = "expected either base-site or base-persons, got both"
        raise SettingsError(msg)
    if settings.sizes is not None and settings.sites is None:
        msg = "sizes: expected the number of sites to deal persons into, as sites, got none"
        raise SettingsError(msg)
    for name, number in (("sites", settings.sites), ("divide", settings.divide)):
        if number is not None and number < 1:
            msg = f"{name}: expected at least 1, got {number}"
            raise SettingsError(msg)
    if not settings.shares[0] > 0:
        msg = f"shares: expected a first share, of training, above 0, got {settings.shares[0]:g}"
        raise SettingsError(msg)


def _check_persons(parts: Iterable[Sequence[CaseRef]]) -> None:
    """Refuse a person in two parts: somebody tested on would have been trained on elsewhere."""
    first: dict[str, tuple[int, CaseRef]] = {}
    for number, part in enumerate(parts):
        for case in part:
            place, other = first.setdefault(case.person, (number, case))
            if place != number:
                msg = (
                    f"person {case.person!r}: expected all scans at one site, got {other.name!r} "
                    f"at {other.site!r} and {case.name!r} at {case.site!r}; name persons apart "
                    f"if these are two, else give all their scans one site"
                )
                raise SettingsError(msg)


def _parts(name: str, cases: Sequence[CaseRef], number: int, seed: int) -> list[list[CaseRef]]:
    persons = len({case.person for case in cases})
    if number > persons:
        msg = f"divide: expected at most the {persons} persons of site {name!r}, got {number}"
        raise SettingsError(msg)
    return list(split_sites(cases, number, seed).values())


def _split_site(
    name: str, cases: Sequence[CaseRef], settings: PartitionSettings, seed: int
) -> SiteCases:
    persons = len({case.person for case in cases})
    shares = {1: (1.0, 0.0, 0.0), 2: (1.0, 0.0, 1.0)}.get(persons, settings.shares)
    training, validation, test = split_persons(cases, shares, seed)
    if not training:
        msg = f"shares: of the {persons} persons of site {name!r} none is left for training"
        raise SettingsError(f"{msg}, got {settings.shares}")
    return SiteCases(tuple(training), tuple(validation), tuple(test))


def _site_names(sites: Iterable[str], reserved: str | None) -> dict[str, str]:
    """Return a name for each site that can travel, and that no other has, capitals or not."""
    taken = set() if reserved is None else {reserved.casefold()}
    names: dict[str, str] = {}
    for name in sorted(sites, key=lambda name: (_plain(name) != name, name)):
        unique, number = _plain(name), 1
        while unique.casefold() in taken:
            number += 1
            unique = f"{_plain(name)[:50]}-{number}"
        taken.add(unique.casefold())
        names[name] = unique
    return names


def _plain(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "-", name)[:60].strip(" ._-")
    return plain or "site"
