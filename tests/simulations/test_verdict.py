"""The sentences on top of a report never say more than the numbers."""

import pytest

from dafne_federated.core.run_folder import RunInfo, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.simulations.comparison import compare
from dafne_federated.simulations.test_results import ARMS, TestRow
from dafne_federated.simulations.verdict import verdict

INFO = RunInfo(
    run="0" * 32,
    created=1,
    base_digest="a" * 64,
    base_name="Limb",
    plan_digest="b" * 64,
    settings=RunSettings(rounds=3, margin=0.02),
    versions={},
    command="",
)


@pytest.mark.parametrize(
    ("federated", "words"),
    [
        (0.40, "lowered mean Dice from 0.50 to 0.40 on"),
        (0.496, "left mean Dice practically unchanged (0.500 to 0.496) on"),
        (0.504, "left mean Dice practically unchanged (0.500 to 0.504) on"),
        (0.506, "raised mean Dice from 0.50 to 0.51 on"),
    ],
)
def test_no_rise_is_claimed_where_there_is_none(federated: float, words: str) -> None:
    first, *others = verdict(INFO, [], _result(), compare(_rows((0.5, 0.6, federated)), ()))
    assert words in first
    assert "(1 person of 1 site; " in first
    assert first.endswith("training each site alone reached 0.60, which is more.")
    warned = any("do not use it before the reason is known" in other for other in others)
    assert warned == (federated < 0.45)


def test_persons_who_gained_are_counted() -> None:
    rows = _rows((0.5, 0.6, 0.9)) + _rows((0.5, 0.6, 0.4), person="b")
    (first, _) = verdict(INFO, [], _result(), compare(rows, ()))
    assert "(2 persons of 1 site; higher in 1 of 2 persons)" in first


def test_a_site_that_lost_is_named() -> None:
    rows = _rows((0.5, 0.6, 0.9)) + _rows((0.7, 0.6, 0.65), site="south")
    sentences = verdict(INFO, [], _result(), compare(rows, ()))
    assert sentences[1] == "It fell at 1 of 2 sites: south (0.70 to 0.65)."


def test_labels_that_lost_are_named_worst_first_even_where_the_site_gained() -> None:
    rows = _rows((0.5, 0.6, 0.9))
    for label, after in (("b", 0.45), ("c", 0.3), ("d", 0.49), ("e", 0.4), ("f", 0.44)):
        rows += [row.model_copy(update={"label": label}) for row in _rows((0.5, 0.6, after))]
    sentences = verdict(INFO, [], _result(), compare(rows, ()))
    assert sentences[1] == (
        "Single labels fell by more than 0.02: c of north (0.50 to 0.30), "
        "e of north (0.50 to 0.40), f of north (0.50 to 0.44) and 1 more."
    )


def test_local_training_that_is_as_good_is_called_so() -> None:
    (first, _) = verdict(INFO, [], _result(), compare(_rows((0.5, 0.8, 0.802)), ()))
    assert first.endswith("training each site alone reached 0.80, practically the same.")


def test_without_a_federated_arm_the_validation_persons_speak() -> None:
    rows = [row for row in _rows((0.5, 0.6, 0.7)) if row.arm != "federated"]
    (first, _) = verdict(INFO, [], _result(), compare(rows, ()))
    assert "raised mean Dice from 0.40 to 0.60 on the validation persons of 1 site" in first


def test_nothing_measured_is_nothing_known() -> None:
    (first, last) = verdict(INFO, [], _result(measured=False), None)
    assert first == "No Dice was measured, so nothing is known about the quality of this run."
    assert last.startswith("Released as Limb_1.model, the state after round 2")


def test_a_refused_release_is_refused_in_words() -> None:
    (*_, last) = verdict(INFO, [], _result(released=False), None)
    assert last == "Nothing was released: the margin."


def test_a_run_without_an_end_claims_nothing() -> None:
    (only,) = verdict(INFO, [], None, None)
    assert "has not ended: 0 of 3 rounds of training are on record" in only


def _result(released: bool = True, measured: bool = True) -> RunResult:
    return RunResult(
        released=released,
        reason="the margin",
        round=2 if released else None,
        release="Limb_1.model" if released else "",
        base_dice={"s": {"l": 0.4}} if measured else {},
        dice={"s": {"l": 0.6}} if measured else {},
    )


def _rows(values: tuple[float, ...], *, site: str = "north", person: str = "a") -> list[TestRow]:
    return [
        TestRow(
            arm=arm, site=site, person=person, case=person, label="l",
            dice=dice, hd95=None, volume_error=0.0,
        )
        for arm, dice in zip(ARMS, values, strict=True)
    ]  # fmt: skip
