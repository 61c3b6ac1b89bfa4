"""Lines are whole or absent, and figures of persons come with honest intervals and tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import DataError, RunError
from dafne_federated.simulations.benchmark_records import (
    Score,
    TestLine,
    append_line,
    read_lines,
)
from dafne_federated.simulations.benchmark_statistics import (
    dice_matrix,
    difference,
    holm,
    interval,
)


def line(seed: int, values: Sequence[float], held_out: bool = False) -> TestLine:
    scores = tuple(
        Score(person=f"p{n}", site="s", case=f"c{n}", label="l", dice=value, held_out=held_out)
        for n, value in enumerate(values)
    )
    return TestLine(
        cell=f"{seed:016d}", scenario="x", arm="a", seed=seed, persons=1, fold="", scores=scores
    )


def test_a_line_that_a_kill_cut_short_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, line(1, [0.5]))
    with path.open("ab") as file:
        file.write(b'{"kind":"test","cell":"00')
    assert [one.seed for one in read_lines(path, TestLine)] == [1]
    append_line(path, line(2, [0.6]))
    assert read_lines(path, TestLine) == [line(1, [0.5]), line(2, [0.6])]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, line(1, [0.5]))
    path.write_bytes(path.read_bytes().replace(b"0.5", b"1.5"))
    with pytest.raises(RunError, match=r"line 1: scores\.0\.dice"):
        read_lines(path, TestLine)


def test_a_person_counts_once_however_many_labels_and_scans_there_are() -> None:
    scores = [
        Score(person="p", site="s", case=case, label=label, dice=value)
        for case, label, value in [("1", "a", 0.2), ("2", "a", 0.4), ("1", "b", 0.9)]
    ]
    own = line(1, []).model_copy(update={"scores": tuple(scores)})
    assert dice_matrix([own]) == (["p"], pytest.approx(np.array([[0.6]])))


def test_seeds_that_measured_other_persons_are_refused() -> None:
    with pytest.raises(DataError, match="the same persons"):
        dice_matrix([line(1, [0.5]), line(2, [0.5, 0.6])])


def test_an_interval_holds_the_mean_and_grows_with_the_spread_of_seeds() -> None:
    persons = 0.7 + 0.1 * np.random.default_rng(0).normal(size=(20, 1))
    alike = interval(persons + np.zeros(3))
    apart = interval(persons + np.array([-0.2, 0.0, 0.2]))
    for found in (alike, apart):
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.mean < found.high
    assert apart.high - apart.low > 2 * (alike.high - alike.low)  # type: ignore[union-attr, operator]
    # As the formula for the mean of persons has it, for seeds that do not differ.
    width = 2 * 1.96 * persons.std() / np.sqrt(len(persons))
    assert alike.high - alike.low == pytest.approx(width, rel=0.1)  # type: ignore[union-attr, operator]


def test_one_person_has_no_interval_and_nobody_no_mean() -> None:
    found = interval(np.array([[0.5, 0.7]]))
    assert found is not None
    assert (found.mean, found.low) == (pytest.approx(0.6), None)
    assert interval(np.empty((0, 2))) is None


def test_persons_are_compared_with_themselves() -> None:
    values = np.linspace(0.3, 0.9, 8)
    own = [line(seed, list(values + 0.01 + 0.001 * np.arange(8))) for seed in (1, 2)]
    found = difference(own, [line(1, list(values)), line(2, list(values))])
    assert found is not None
    assert (found.better, found.persons) == (8, 8)
    assert found.gain.mean == pytest.approx(0.0135)
    # All eight of one sign: 2 of 2^8 orders of signs are as far out.
    assert found.p == pytest.approx(2 / 2**8)
    assert found.gain.low is not None
    assert found.gain.low > 0.01  # though persons differ far more among themselves


def test_there_is_no_test_where_there_are_too_few_or_it_is_not_wanted() -> None:
    few = difference([line(1, [0.5] * 5)], [line(1, [0.4] * 5)])
    wanted = difference([line(1, [0.5] * 9)], [line(1, [0.4] * 9)], descriptive=True)
    assert few is not None
    assert wanted is not None
    assert few.p is None
    assert wanted.p is None
    assert difference([line(1, [0.5])], [line(1, [0.5])], held_out=True) is None


def test_holm_is_as_worked_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": None, "d": 0.06}
