"""All arms are averaged over the same persons: cases first, then persons, labels, sites."""

import pytest

from dafne_federated.simulations.comparison import compare, persons_to_show
from dafne_federated.simulations.test_results import TestRow


def test_cases_are_averaged_before_persons() -> None:
    found = compare(
        [_row(0.5, person="a", case="a1"), _row(0.7, person="a", case="a2"), _row(0.8, person="b")],
        (),
    )
    assert found.lines["s"][0].dice("base") == pytest.approx(0.7)
    assert found.lines["s"][0].persons == 2


def test_labels_and_sites_count_the_same_however_many_persons_they_have() -> None:
    rows = [_row(0.2), _row(0.6, label="m"), _row(0.8, person="b", label="m")]
    rows += [_row(0.9, site="t")]
    found = compare(rows, ("m", "l"))
    assert [line.label for line in found.lines["s"]] == ["m", "l"]
    assert found.site_lines["s"].dice("base") == pytest.approx(0.45)
    assert found.total.dice("base") == pytest.approx((0.45 + 0.9) / 2)
    assert found.total.persons == 3


def test_order_does_not_change_a_bit() -> None:
    rows = [
        _row(0.1 * k, person=str(k), arm=arm) for k in range(9) for arm in ("base", "federated")
    ]
    assert compare(rows, ()) == compare(rows[::-1], ())


def test_a_case_without_the_label_counts_as_invented_or_not_at_all() -> None:
    rows = [_row(0.5), _row(0.9, arm="federated")]
    rows += [
        _row(0.0, person="b", volume=None),
        _row(None, person="b", volume=None, arm="federated"),
    ]
    found = compare(rows, ())
    assert found.total.gain("federated") == pytest.approx(0.4)
    assert found.total.persons == 1
    (entry,) = found.empty
    assert entry.invented == {"base": 1, "federated": 0}
    assert entry.absent == {"base": 1, "federated": 1}


def test_distances_run_over_cases_that_every_arm_drew() -> None:
    rows = [_row(0.5, hd95=4.0), _row(0.0, person="b", volume=-100.0)]
    rows += [
        _row(0.5, hd95=6.0, arm="federated"),
        _row(0.5, hd95=90.0, person="b", arm="federated"),
    ]
    found = compare(rows, ())
    assert found.total.means["base"].hd95 == 4
    assert found.total.means["federated"].hd95 == 6
    assert (found.total.persons, found.total.distance_persons) == (2, 1)
    assert found.empty[0].missed == {"base": 1, "federated": 0}


def test_volume_errors_of_opposite_sign_cancel_in_the_bias_only() -> None:
    found = compare([_row(0.5, volume=10.0), _row(0.5, person="b", volume=-20.0)], ())
    assert found.total.means["base"].volume_size == 15
    assert found.total.means["base"].volume_bias == -5


def test_what_some_arm_lacks_is_left_out_and_counted() -> None:
    rows = [_row(0.5), _row(0.1, person="b"), _row(0.7, arm="federated")]
    found = compare(rows, ())
    assert found.total.dice("base") == 0.5
    assert found.unpaired == 1


def test_an_arm_that_one_site_lacks_has_no_total() -> None:
    rows = [_row(0.5), _row(0.6, arm="local only"), _row(0.5, site="t")]
    found = compare(rows, ())
    assert found.site_lines["s"].dice("local only") == 0.6
    assert found.total.dice("local only") is None
    assert found.total.dice("base") == 0.5


def test_several_local_models_stand_for_one() -> None:
    rows = [_row(0.5), _row(0.6, arm="local only"), _row(0.8, arm="local only")]
    found = compare(rows, ())
    assert found.several
    assert found.total.dice("local only") == pytest.approx(0.7)
    assert found.persons["s", "a"]["local only"] == pytest.approx(0.7)


def test_an_arm_is_above_itself_by_nothing() -> None:
    assert compare([_row(0.5)], ()).total.gain("base") == 0
    assert compare([_row(0.5)], ()).total.gain("federated") is None


def test_lowest_median_and_highest_person_are_shown() -> None:
    rows = [_row(0.1 * k, person=f"p{k}", arm="federated") for k in (3, 1, 4, 2)]
    words = {person: word for (_, person), word in persons_to_show(rows).items()}
    assert words == {"p1": "lowest", "p2": "median", "p4": "highest"}


@pytest.mark.parametrize(("count", "words"), [(0, []), (1, ["only"]), (2, ["lowest", "highest"])])
def test_few_persons_are_shown_as_what_they_are(count: int, words: list[str]) -> None:
    rows = [_row(0.1 * k, person=f"p{k}", arm="federated") for k in range(count)]
    assert list(persons_to_show(rows).values()) == words


def _row(
    dice: float | None,
    *,
    arm: str = "base",
    site: str = "s",
    person: str = "a",
    case: str = "",
    label: str = "l",
    hd95: float | None = None,
    volume: float | None = 0.0,
) -> TestRow:
    return TestRow(
        arm=arm, site=site, person=person, case=case or person, label=label,
        dice=dice, hd95=hd95, volume_error=volume,
    )  # fmt: skip
