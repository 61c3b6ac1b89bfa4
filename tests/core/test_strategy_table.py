"""The table says what moves and what combines, and every refusal names a way that works."""

import itertools

import pytest

from dafne_federated.core import strategy_table
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.strategy_table import (
    ROBUST_TABLE,
    STRATEGY_TABLE,
    RoundRule,
    bad_left,
    check_combination,
    check_late,
    check_optimisation,
    least_sites,
    round_rule,
    updates_suffice,
)


@pytest.mark.parametrize(
    ("rule", "held", "absent", "personal"),
    [
        (RoundRule(), (), (), ()),
        (RoundRule("b", "b"), ("a",), ("a",), ()),
        (RoundRule("a", "a"), ("b",), ("b",), ()),
        (RoundRule("both", "a"), (), ("b",), ("b",)),
    ],
)
def test_what_stands_still_what_stays_and_what_comes_back(
    rule: RoundRule, held: tuple[str, ...], absent: tuple[str, ...], personal: tuple[str, ...]
) -> None:
    assert (rule.held, rule.absent, rule.personal) == (held, absent, personal)


def test_alternating_begins_with_the_factor_that_is_zero() -> None:
    # With b zero the gradient of a is zero: a round of a would do nothing.
    assert [round_rule("alternating", n).trained for n in (1, 2, 3, 4)] == ["b", "a", "b", "a"]


@pytest.mark.parametrize(
    ("strategy", "robust", "pairs"), list(itertools.product(STRATEGY_TABLE, ROBUST_TABLE, [0, 1]))
)
def test_what_is_refused_names_a_way_that_is_not(strategy: str, robust: str, pairs: int) -> None:
    try:
        check_combination(strategy, robust, 1, 5, bool(pairs))
    except SettingsError as error:
        way = str(error).split("; take ")[1]
        if "robust '" in way:
            robust = way.split("robust '")[1].split("'")[0]
        else:
            strategy = way.split("strategy '")[1].split("'")[0]
        check_combination(strategy, robust, 1, 5, bool(pairs))


@pytest.mark.parametrize("strategy", STRATEGY_TABLE)
def test_optimisers_that_are_refused_name_ways_that_are_not(strategy: str) -> None:
    refused = 0
    for optimiser, proximal in (("momentum", 0.0), ("adam", 0.0), ("none", 0.1)):
        try:
            check_optimisation(strategy, optimiser, proximal)
        except SettingsError as error:
            refused += 1
            way = str(error).split("; take ")[1].split("strategy '")[1].split("'")[0]
            check_optimisation(way, optimiser, proximal)
            check_optimisation(strategy, "none", 0.0)
    assert refused == {"shared-a": 3, "global+local": 3, "fedavg": 0}.get(
        strategy, 0 if strategy in ("frozen-a", "alternating") else 2
    )


def test_how_many_bad_sites_are_borne() -> None:
    assert [least_sites("krum", bad) for bad in (0, 1, 2)] == [3, 5, 7]
    assert [least_sites("geometric-median", bad) for bad in (0, 1, 2)] == [1, 3, 5]


def test_a_refused_site_was_one_of_the_bad_ones_and_a_silent_one_may_not_have_been() -> None:
    for rule, sites in (("krum", 5), ("multi-krum", 5), ("geometric-median", 3)):
        assert bad_left(rule, 1, sites, refused=0) == 1
        assert bad_left(rule, 1, sites - 1, refused=1) == 0
        assert bad_left(rule, 1, sites - 1, refused=0) is None
        assert updates_suffice(rule, 1, sites, sites - 1, refused=1)
        assert not updates_suffice(rule, 1, sites, sites - 1, refused=0)
        # More than the bad ones that were reckoned with are no reason to close with less.
        assert not updates_suffice(rule, 1, sites, sites - 2, refused=2)
    assert bad_left("krum", 1, 6, refused=1) == 1  # there are enough to bear another one
    assert bad_left("krum", 2, 6, refused=1) == 1
    for rule in ("none", "clipped"):
        assert updates_suffice(rule, 1, 3, 3, refused=0)
        assert not updates_suffice(rule, 1, 3, 2, refused=1)


def test_late_updates_are_refused_where_the_common_factor_moves() -> None:
    check_late("alternating", "drop")
    for name, rules in STRATEGY_TABLE.items():
        if rules.late:
            check_late(name, "use")
    with pytest.raises(SettingsError, match=r"moves another factor in each round.*'frozen-a'"):
        check_late("alternating", "use")


def test_the_printed_table_is_the_enforced_one() -> None:
    lines = [line for line in (strategy_table.__doc__ or "").splitlines() if line.startswith("| ")]
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    words = {True: "yes", False: "no"}
    assert printed == [
        [
            name,
            r.pairs,
            *(words[w] for w in (r.ranks, r.proximal, r.sums, r.late, r.common)),
            r.noisy,
        ]
        for name, r in STRATEGY_TABLE.items()
    ]
