"""Changes of Dice are of the same persons, name nobody, and no person both chooses and accepts."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from dafne_federated.core.errors import StateError
from dafne_federated.core.metrics import Agreement
from dafne_federated.core.paired_changes import (
    PairedChange,
    accepting,
    change_fields,
    mean_change,
    paired_changes,
    together,
    told,
)

NAMES = [f"person-{number}" for number in range(9)]


def rows(dice: dict[str, float], label: str = "x") -> list[Agreement]:
    return [Agreement(case, label, value, None, 0.0) for case, value in dice.items()]


def change(*values: float) -> PairedChange:
    return PairedChange(
        persons=len(values), total=sum(values), squares=sum(value**2 for value in values)
    )


def test_every_other_person_accepts_whatever_the_order() -> None:
    for count in range(1, 10):
        accepts = accepting(NAMES[:count])
        assert len(accepts) == (count + 1) // 2
        assert accepts == accepting(reversed(NAMES[:count])) == accepting(NAMES[:count] * 2)
        assert accepts <= set(NAMES[:count])


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.uniform(0.4, 0.9, (2, 7))
    lower = change(*(after - before)).lower(0.9)
    expected = stats.ttest_rel(after, before).confidence_interval(0.8).low  # one side of two
    assert lower == pytest.approx(expected, abs=1e-12)
    assert change(0.1, 0.1, 0.1).lower(0.95) == pytest.approx(0.1)


def test_a_person_counts_once_however_many_cases_there_are() -> None:
    persons = {"a1": "a", "a2": "a", "b": "b"}
    before = rows({"a1": 0.5, "a2": 0.5, "b": 0.5})
    after = rows({"a1": 0.7, "a2": 0.9, "b": 0.4})
    (chooses,), (accepts,) = (part.values() for part in paired_changes(before, after, persons))
    found = {own.total for own in (chooses, accepts)}
    assert sorted(found) == pytest.approx([-0.1, 0.3])
    assert (chooses.persons, accepts.persons) == (1, 1)
    _, whole = paired_changes(before, after, persons, {"a", "b"})
    assert whole["x"].mean == pytest.approx(0.1)


def test_parts_together_are_the_whole() -> None:
    values = [0.1, -0.2, 0.05, 0.3]
    assert together([change(*values[:1]), change(*values[1:])]).lower(0.95) == pytest.approx(
        change(*values).lower(0.95)
    )


def test_only_labels_that_are_there_before_and_after_count() -> None:
    empty = [Agreement("a", "x", 0.0, None, None)]  # invented: the truth does not hold it
    assert paired_changes(empty, empty, {"a": "a"}) == ({}, {})
    assert paired_changes([], rows({"a": 0.5}), {"a": "a"}) == ({}, {})


def test_what_travels_comes_back_and_holds_no_name() -> None:
    parts = {"x": change(0.1)}, {"x": change(0.2, -0.1), "y": change(0.0, 0.3)}
    fields = change_fields(("x", "y"), parts)
    sums = (fields[f"change_{name}"] for name in ("persons", "total", "squares"))
    assert told(("x", "y"), *sums) == [parts]  # type: ignore[arg-type]
    assert fields["change_persons"] == [1, 0, 2, 2]
    assert told(("x", "y"), [], [], []) == [({}, {})]
    assert told(("x", "y"), [], [], [], 2) == [({}, {}), ({}, {})]


def test_changes_from_two_states_travel_one_after_the_other_and_are_of_the_same_persons() -> None:
    one = {"x": change(0.1)}, {"x": change(0.2, -0.1), "y": change(0.0, 0.3)}
    two = {"x": change(0.3)}, {"x": change(0.1, -0.4), "y": change(0.5, 0.3)}
    fields: dict[str, Any] = change_fields(("x", "y"), one, two)
    persons, *sums = (fields[f"change_{name}"] for name in ("persons", "total", "squares"))
    assert told(("x", "y"), persons, *sums, 2) == [one, two]
    with pytest.raises(StateError, match="expected 4 counts and sums, got 8"):
        told(("x", "y"), persons, *sums)
    with pytest.raises(StateError, match="the same numbers of persons for each state"):
        told(("x", "y"), [*persons[:-1], 0], *sums, 2)


@pytest.mark.parametrize(
    ("persons", "total", "squares", "words"),
    [
        ([1], [0.1], [0.01], "expected 2 counts and sums, got 1"),
        ([1, 1], [0.1], [0.01, 0.0], "expected 2 counts"),
        ([0, 2], [0.0, 3.0], [0.0, 4.5], "sums of 2 differences of Dice"),  # more than 1 each
        ([0, 2], [0.0, 1.0], [0.0, 0.1], "sums of 2 differences of Dice"),  # below mean squared
    ],
)
def test_what_no_differences_can_sum_to_is_refused(
    persons: list[int], total: list[float], squares: list[float], words: str
) -> None:
    with pytest.raises(StateError, match=words):
        told(("x",), persons, total, squares)


def test_each_site_and_label_counts_the_same() -> None:
    changes = {"a": {"x": change(0.1, 0.1, 0.1), "y": change(0.3)}, "b": {"x": change(0.0)}}
    assert mean_change(changes) == pytest.approx(0.1)
    assert mean_change({}) is None
