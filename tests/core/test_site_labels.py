"""Labels are matched by name, what has another name is told by the site, the rest is missing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.site_labels import site_labels
from dafne_federated.core.volumes import Case

MODEL = ("disc", "canal", "vertebra")


def mask(number: int) -> np.ndarray:
    return np.arange(4).reshape(2, 2, 1) == number


def test_a_label_that_the_table_does_not_know_is_missing() -> None:
    here = site_labels(MODEL, {"vertebra_L", "vertebra_R", "disc", "rib"})
    assert (here.missing, here.lacking) == ((2,), ("canal",))


def test_nothing_changes_where_all_is_named_alike(make_case: Callable[..., Case]) -> None:
    here = site_labels(MODEL, {*MODEL, "rib"})
    masks = {"rib": mask(0), "disc_L": mask(1), "canal": mask(2)}
    assert here.missing == ()
    assert list(here.masks(masks).items()) == list(masks.items())
    case = make_case("one", 1)
    assert here.case(case).masks.keys() == case.masks.keys()


def test_other_names_become_those_of_the_model_in_their_order_and_with_their_side() -> None:
    here = site_labels(MODEL, {"Discus_L", "vertebra", "canal"}, {"disc": "Discus"})
    assert here.missing == ()
    named = here.masks({"vertebra": mask(0), "Discus_L": mask(1), "canal": mask(2)})
    assert list(named) == ["vertebra", "disc_L", "canal"]
    assert np.array_equal(named["disc_L"], mask(1))


def test_names_may_be_exchanged_and_a_false_friend_is_left_out() -> None:
    names = {"disc": "canal", "canal": "disc"}
    named = site_labels(MODEL, MODEL, names).masks({"disc": mask(0), "canal": mask(1)})
    assert np.array_equal(named["canal"], mask(0))
    assert np.array_equal(named["disc"], mask(1))
    here = site_labels(MODEL, {"disc", "Discus"}, {"disc": "Discus"})
    named = here.masks({"disc": mask(0), "Discus": mask(1)})
    assert list(named) == ["disc"]
    assert np.array_equal(named["disc"], mask(1))


def test_a_setting_outweighs_the_table_both_ways() -> None:
    here = site_labels(MODEL, {"disc", "vertebra"}, annotated=("canal", "vertebra"))
    assert here.lacking == ("disc",)
    masks = {"disc": mask(0), "disc_L": mask(1), "vertebra": mask(2), "rib": mask(3)}
    assert list(here.masks(masks)) == ["vertebra", "rib"]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"names": {"dsc": "disc"}}, SettingsError, r"label_names: .*, got 'dsc'"),
        ({"annotated": ("disc", "rib")}, SettingsError, r"annotated: .* labels .*, got 'rib'"),
        ({"names": {"disc": "rib", "canal": "rib"}}, SettingsError, "a name of its own"),
        ({"names": {"disc": "Discus"}}, DataError, r"names of the data, \['rib'\], got 'Discus'"),
        ({}, SettingsError, "no label of the model.*say so in label_names"),
        ({"annotated": ()}, SettingsError, "no label of the model"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        site_labels(MODEL, {"rib"}, **options)
