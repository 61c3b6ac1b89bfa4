"""No person is in two places, whatever the split."""

from pathlib import Path

import pytest

from dafne_federated.core.dataset import CaseRef
from dafne_federated.core.errors import SettingsError
from dafne_federated.simulations.partition import Partition, PartitionSettings, divide

CASES = [
    CaseRef(name=f"{site}{p}-{scan}", person=f"{site}{p}", site=site, image=Path("i"), label=None)
    for site, persons in (("A", 8), ("B", 5), ("C", 1), ("D/x", 2))
    for p in range(persons)
    for scan in (1, 2)
]

SETTINGS = [
    PartitionSettings(),
    PartitionSettings(base_site="A"),
    PartitionSettings(base_site="A", test_site="B"),
    PartitionSettings(base_persons=4, sites=3, sizes=(1, 2, 5)),
    PartitionSettings(base_site="A", sites=2),
    PartitionSettings(base_persons=3, test_site="A", sites=4),
]


def places(partition: Partition) -> dict[str, set[str]]:
    found = {"base": partition.base, "held out": partition.held_out}
    for name, site in partition.sites.items():
        found |= {
            f"{name} training": site.training,
            f"{name} validation": site.validation,
            f"{name} test": site.test,
        }
    return {place: {ref.person for ref in refs} for place, refs in found.items()}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_person_is_in_one_place(settings: PartitionSettings, seed: int) -> None:
    found = list(places(divide(CASES, settings, seed)).values())
    everyone = {ref.person for ref in CASES}
    assert set().union(*found) == everyone
    assert sum(map(len, found)) == len(everyone)


def test_the_order_of_cases_does_not_matter() -> None:
    assert divide(CASES, SETTINGS[3], 5) == divide(CASES[::-1], SETTINGS[3], 5)


def test_named_sites_do_what_they_are_named_for() -> None:
    partition = divide(CASES, PartitionSettings(base_site="A", test_site="B"), 0)
    assert {ref.site for ref in partition.base} == {"A"}
    assert {ref.site for ref in partition.held_out} == {"B"}
    assert sorted(partition.sites) == ["C", "D-x"]  # names that can travel and be file names


def test_a_site_of_one_or_two_persons_still_trains() -> None:
    sites = divide(CASES, PartitionSettings(), 0).sites
    assert [len(part) for part in (sites["C"].training, sites["C"].validation)] == [2, 0]
    assert not sites["C"].test
    assert len(sites["D-x"].training) == len(sites["D-x"].test) == 2


def test_sites_can_be_divided() -> None:
    cases = [ref for ref in CASES if ref.site in "AB"]
    partition = divide(cases, PartitionSettings(divide=2), 0)
    assert sorted(partition.sites) == ["A-1", "A-2", "B-1", "B-2"]


def test_unknown_names_are_named() -> None:
    with pytest.raises(SettingsError, match=r"expected one of the sites \['A', .* got 'Z'"):
        divide(CASES, PartitionSettings(base_site="Z"), 0)
    with pytest.raises(SettingsError, match="no person is left for the sites"):
        divide([ref for ref in CASES if ref.site == "A"], PartitionSettings(base_site="A"), 0)
