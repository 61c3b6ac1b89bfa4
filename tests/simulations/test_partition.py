"""No person is in two places, whatever the split."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafne_federated.core.dataset import CaseRef
from dafne_federated.core.errors import DataError, SettingsError
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


CASE = st.builds(
    lambda person, site: (f"p{person}", site),
    st.integers(0, 9),
    st.sampled_from(["X/1", "X-1", "x"]),
)
NUMBER = st.none() | st.integers(-1, 4)
SITE = st.none() | st.sampled_from(["X/1", "X-1", "x"])
SHARE = st.sampled_from([0.0, 1.0, 2.0])


@given(
    scans=st.lists(CASE, min_size=1, max_size=24),
    base_site=SITE,
    base_persons=NUMBER,
    test_site=SITE,
    sites=NUMBER,
    divide_by=NUMBER,
    shares=st.tuples(SHARE, SHARE, SHARE),
)
def test_a_division_is_refused_or_puts_every_person_in_one_place(
    scans: list[tuple[str, str]],
    base_site: str | None,
    base_persons: int | None,
    test_site: str | None,
    sites: int | None,
    divide_by: int | None,
    shares: tuple[float, float, float],
) -> None:
    cases = [
        CaseRef(f"scan-{number:02d}", person, site, Path(f"{number}"), None)
        for number, (person, site) in enumerate(scans)
    ]
    settings = PartitionSettings(
        base_site, base_persons, test_site, sites, divide_by, shares=shares
    )
    try:
        partition = divide(cases, settings, 1)
    except (SettingsError, DataError):
        return
    found = list(places(partition).values())
    everyone = {ref.person for ref in cases}
    assert set().union(*found) == everyone
    assert sum(map(len, found)) == len(everyone)
    assert all(site.training for site in partition.sites.values())
    names = [*partition.sites, *({test_site} if test_site else ())]
    assert len({name.casefold() for name in names}) == len(names)


def test_sites_whose_names_cannot_travel_get_distinct_ones() -> None:
    names = ["X/1", "X-1", "x 1", "X 1", "東京", "大阪", "site"]
    cases = [CaseRef(f"{n}", f"{n}", name, Path(f"{n}"), None) for n, name in enumerate(names)]
    sites = divide(cases, PartitionSettings(test_site="site"), 0).sites
    assert sorted(sites) == ["X 1", "X-1", "X-1-2", "site-2", "site-3", "x 1-2"]
    assert sorted(ref.name for s in sites.values() for ref in s.training) == list("012345")
    assert sites["X-1"].training[0].site == "X-1"  # a name that can travel is kept


SCANNED_TWICE = [
    CaseRef(f"{site}{n}", f"p{n}", site, Path(f"{site}{n}"), None)
    for site in "ab"
    for n in range(4)
]


@pytest.mark.parametrize(
    ("cases", "settings", "words"),
    [
        (
            CASES,
            PartitionSettings(base_site="A", test_site="A"),
            "expected two sites, got 'A' twice",
        ),
        (CASES, PartitionSettings(base_site="A", base_persons=2), "either base-site or base-per"),
        (CASES, PartitionSettings(base_persons=0), "base-persons: expected 1 to 15 of 16 .* got 0"),
        (CASES, PartitionSettings(base_persons=-3), "base-persons: expected 1 to 15 .* got -3"),
        (CASES, PartitionSettings(base_persons=99), "base-persons: expected 1 to 15 .* got 99"),
        (CASES, PartitionSettings(divide=0), "divide: expected at least 1, got 0"),
        (CASES, PartitionSettings(divide=2), "at most the 1 persons of site 'C', got 2"),
        (CASES, PartitionSettings(sites=0), "sites: expected at least 1, got 0"),
        (CASES, PartitionSettings(sizes=(1, 2)), "sizes: expected the number of sites"),
        (CASES, PartitionSettings(shares=(0, 1, 1)), "shares: expected a first share"),
        (CASES, PartitionSettings(shares=(1, 99, 99)), "of the 8 persons of site 'A' none is left"),
        (SCANNED_TWICE, PartitionSettings(), "person 'p0': .* at 'a' and .* at 'b'"),
        (SCANNED_TWICE, PartitionSettings(base_site="a"), "person 'p0': .* at 'a' and .* at 'b'"),
        (SCANNED_TWICE, PartitionSettings(test_site="b"), "person 'p0': .* at 'b' and .* at 'a'"),
        (SCANNED_TWICE, PartitionSettings(base_site="a", sites=2), "person 'p0'"),
    ],
)
def test_what_contradicts_itself_is_refused(
    cases: list[CaseRef], settings: PartitionSettings, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        divide(cases, settings, 0)


def test_a_person_scanned_at_two_sites_can_be_dealt_to_one() -> None:
    partition = divide(SCANNED_TWICE, PartitionSettings(sites=2), 0)
    assert sum(map(len, places(partition).values())) == 4
