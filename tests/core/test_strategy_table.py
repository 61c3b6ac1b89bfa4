"""The table says what moves and what combines, and every refusal names a way that works."""

import itertools

import pytest

from dafne_federated.core import strategy_table
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.strategy_table import (
    ROBUST_TABLE,
    STRATEGY_TABLE,
    RoundRule,
    check_combination,
    check_optimisation,
    least_sites,
    round_rule,
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


def test_the_printed_table_is_the_enforced_one() -> None:
    lines = [line for line in (strategy_table.__doc__ or "").splitlines() if line.startswith("| ")]
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    words = {True: "yes", False: "no"}
    assert printed == [
        [name, r.pairs, words[r.ranks], words[r.proximal], words[r.sums], words[r.common]]
        for name, r in STRATEGY_TABLE.items()
    ]
