"""A scenario says all that acts on its answer, and persons are divided once."""

import math
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.dataset import CaseRef
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.volumes import Case
from dafne_federated.simulations.benchmark_cells import Cell, Group, cell_key, groups
from dafne_federated.simulations.benchmark_division import divide_persons
from dafne_federated.simulations.benchmark_images import (
    thinned,
    with_merged_labels,
    with_next_names,
)
from dafne_federated.simulations.benchmark_scenario import (
    Fold,
    Scenario,
    read_scenario,
    scenario_of,
    scenarios,
)

TEXT = """
version = 1
question = "Which?"
data = "some"
[persons]
base = 4
tuning = 2
test = 3
[sites]
number = 2
persons = [1, 3]
[arms.central-scratch]
where = "central"
trains = "scratch"
[arms.local-lora]
where = "local"
trains = "adapter"
variants = [{ learning-rate = 1e-3 }, { learning-rate = 3e-3 }]
[arms.federated-product]
where = "federated"
trains = "adapter"
settings = { strategy = "product", rounds = 2 }
"""
CASES = [
    CaseRef(f"p{n:02d}-{scan}", f"p{n:02d}", "AB"[n % 2], Path("x"), None)
    for n in range(20)
    for scan in (1, 2)
]


def scenario(old: str = "", new: str = "") -> Scenario:
    assert old in TEXT
    return scenario_of(TEXT.replace(old, new, 1), "test")


@pytest.mark.parametrize("name", sorted(scenarios()))
def test_every_scenario_that_comes_along_is_whole_and_asks_a_question(name: str) -> None:
    _, content = read_scenario(name)
    assert content.question.endswith("?")
    assert "central-scratch" in content.arms
    assert any(arm.where == "federated" for arm in content.arms.values())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"product"', '"shared-a"', "no model for persons of other sites"),
        ('"product"', '"no-such"', "expected one of fedavg"),
        ("rounds = 2", "round = 2", "round"),
        ('trains = "scratch"', 'trains = "nothing"', "'central' expects one of"),
        ('where = "local"', 'where = "local"\nwith-base = true', "only a central arm"),
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version = ", "Invalid value"),
        ('where = "local"\ntrains = "adapter"', 'where = "ensemble"\ntrains = "nothing"', "choose"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(old: str, new: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words.replace("choose", "chosen")):
        scenario(old, new)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"one of \['centre-shift'.*got 'no-such'"):
        read_scenario("no-such")


def test_no_person_is_in_two_places_and_smaller_sizes_are_part_of_larger_ones() -> None:
    found = divide_persons(CASES, scenario(), Fold())
    sites = [name for s in found.sites.values() for name in (*s.trained_on(0), *s.validation)]
    parts = [found.base, found.tuning, found.test, tuple(sites)]
    persons = [{name[:3] for name in part} for part in parts]
    assert [len(part) for part in persons] == [4, 2, 3, 11]
    assert len(set.union(*persons)) == 20
    for site in found.sites.values():
        assert set(site.trained_on(1)) < set(site.trained_on(3)) < set(site.trained_on(0))
        assert len({name[:3] for name in site.trained_on(3)}) == 3
        assert not set(site.trained_on(0)) & set(site.validation)


def test_the_test_persons_do_not_depend_on_what_else_is_divided() -> None:
    one = divide_persons(CASES, scenario(), Fold())
    other = divide_persons(CASES, scenario("base = 4\ntuning = 2", "base = 2\ntuning = 5"), Fold())
    assert one.test == other.test


def test_a_centre_that_is_held_out_and_one_for_the_base_are_nowhere_else() -> None:
    cases = [*CASES, CaseRef("c", "c", "C", Path("x"), None)]
    content = scenario("number = 2\npersons = [1, 3]", "")
    found = divide_persons(cases, content, Fold(held_out="C", base_site="A"))
    assert found.held_out == ("c",)
    assert {name for name in found.base if int(name[1:3]) % 2 == 0} == set(found.base)
    assert list(found.sites) == ["B"]


def test_too_few_persons_are_told_before_anything_is_trained() -> None:
    with pytest.raises(SettingsError, match=r"test: expected at most the 20 persons .* got 30"):
        divide_persons(CASES, scenario("test = 3", "test = 30"), Fold())
    with pytest.raises(SettingsError, match="site 'site-1' has 5 to train on, got 9"):
        divide_persons(CASES, scenario("[1, 3]", "[1, 9]"), Fold())


def test_a_fit_is_named_by_what_acts_on_it_and_by_nothing_else() -> None:
    cell = Cell(Group("local-lora", 1, 0), 0, 1)
    key = cell_key(scenario(), cell, "data")
    same = [
        ('question = "Which?"', 'question = "Who?"'),
        ("persons = [1, 3]", "persons = [1, 2, 3]"),
        ("rounds = 2", "rounds = 3"),
        ("version = 1", "version = 1\nseeds = [1, 7]"),
    ]
    assert {cell_key(scenario(old, new), cell, "data") for old, new in same} == {key}
    others = [
        cell_key(scenario("tuning = 2", "tuning = 1"), cell, "data"),
        cell_key(scenario("number = 2", "number = 3"), cell, "data"),
        cell_key(scenario("1e-3", "2e-3"), cell, "data"),
        cell_key(scenario(), cell, "other data"),
        cell_key(scenario(), Cell(cell.group, 1, 1), "data"),
        cell_key(scenario(), Cell(cell.group, 0, 2), "data"),
        cell_key(scenario(), Cell(Group("local-lora", 3, 0), 0, 1), "data"),
    ]
    assert len({key, *others}) == 8


def test_the_grid_has_each_arm_at_each_size() -> None:
    found = groups(scenario())
    assert len(found) == len(set(found)) == 6


def _case() -> Case:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 3, (4, 5, 6))
    masks = {"one": numbers == 1, "two": numbers == 2}
    image = rng.normal(size=(4, 5, 6)).astype(np.float32)
    return Case("c", "p", "s", image, masks, (1.0, 1.0, 2.0), np.diag([1.0, 1.0, 2.0, 1.0]))


def test_a_thinned_scan_keeps_its_slices_where_they_were() -> None:
    case, thin = _case(), thinned(_case(), 3)
    assert thin.image.shape[-1] == 2
    assert thin.spacing == (1.0, 1.0, 6.0)
    assert thin.affine is not None
    assert case.affine is not None
    np.testing.assert_array_equal(thin.image[..., 1], case.image[..., 3])
    np.testing.assert_array_equal(thin.affine @ [0, 0, 1, 1], case.affine @ [0, 0, 3, 1])
    assert math.prod(thin.masks["one"].shape) == 40


def test_merged_labels_are_unions_and_wrong_ones_go_round() -> None:
    case = _case()
    whole = with_merged_labels(case, {"all": ("one", "two")}).masks["all"]
    np.testing.assert_array_equal(whole, case.masks["one"] | case.masks["two"])
    once = with_next_names(case, ["one", "two"])
    np.testing.assert_array_equal(once.masks["two"], case.masks["one"])
    twice = with_next_names(once, ["one", "two"])
    np.testing.assert_array_equal(twice.masks["one"], case.masks["one"])
