"""Who is where in a simulation: persons for the base, for each site, and for the test."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dafne_federated.core.dataset import CaseRef, split_persons, split_sites
from dafne_federated.core.errors import SettingsError


@dataclass(frozen=True)
class SiteCases:
    """The cases of one site; no person is in two of the lists."""

    training: tuple[CaseRef, ...]
    validation: tuple[CaseRef, ...]
    test: tuple[CaseRef, ...]


@dataclass(frozen=True)
class Partition:
    """A data folder divided for a simulation; no person is in two places.

    Attributes:
        base: Cases that train a base, empty where a base is given.
        sites: Cases by site name.
        held_out: Cases of sites that take no part, for the test.
    """

    base: tuple[CaseRef, ...]
    sites: Mapping[str, SiteCases]
    held_out: tuple[CaseRef, ...]


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
        shares: Relative sizes of training, validation and test within a site, in persons.
    """

    base_site: str | None = None
    base_persons: int | None = None
    test_site: str | None = None
    sites: int | None = None
    divide: int | None = None
    sizes: tuple[float, ...] | None = None
    shares: tuple[float, float, float] = (2.0, 1.0, 1.0)


def divide(cases: Sequence[CaseRef], settings: PartitionSettings, seed: int) -> Partition:
    """Divide cases into base, sites and test, by person, never by slice.

    A site with a single person trains on it and has neither validation nor test; with two, one
    trains and one is tested.

    Raises:
        SettingsError: A site is named that the cases do not have, or nothing is left for sites.
    """
    for name in (settings.base_site, settings.test_site):
        if name is not None and name not in {case.site for case in cases}:
            known = sorted({case.site for case in cases})
            msg = f"expected one of the sites {known}, got {name!r}"
            raise SettingsError(msg)
    base = [case for case in cases if case.site == settings.base_site]
    held_out = [case for case in cases if case.site == settings.test_site]
    rest = [case for case in cases if case.site not in (settings.base_site, settings.test_site)]
    if settings.base_site is None:
        rest = [*rest, *base]
        base = []
    if settings.test_site is None:
        rest = [*rest, *held_out]
        held_out = []
    rest = sorted(set(rest) - set(base) - set(held_out), key=lambda case: case.name)
    if settings.base_persons:
        persons = len({case.person for case in rest})
        shares = (settings.base_persons, persons - settings.base_persons)
        base, rest = split_persons(rest, shares, seed)
    if not rest:
        msg = "no person is left for the sites"
        raise SettingsError(msg)
    groups = split_sites(rest, settings.sites, seed, settings.sizes)
    if settings.divide:
        groups = {
            f"{name}-{number}": part
            for name, group in groups.items()
            for number, part in enumerate(
                split_sites(group, settings.divide, seed).values(), start=1
            )
        }
    sites = {_site_name(name): _split_site(group, settings, seed) for name, group in groups.items()}
    return Partition(tuple(base), sites, tuple(held_out))


def _split_site(cases: Sequence[CaseRef], settings: PartitionSettings, seed: int) -> SiteCases:
    persons = len({case.person for case in cases})
    shares = {1: (1.0, 0.0, 0.0), 2: (1.0, 0.0, 1.0)}.get(persons, settings.shares)
    training, validation, test = split_persons(cases, shares, seed)
    return SiteCases(tuple(training), tuple(validation), tuple(test))


def _site_name(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "-", name)[:60].strip(" ._-")
    return plain or "site"
