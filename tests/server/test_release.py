"""Nothing worse than its base is released, and what is released says where it comes from."""

from dafne_federated.core.run_folder import RoundLine, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.server.release import choose_round, why_not

SETTINGS = RunSettings(margin=0.05)


def line(number: int, trained: bool = True, **sites: dict[str, float | None]) -> RoundLine:
    return RoundLine(
        round=number,
        trained=trained,
        sites={
            name: SiteRound(status="ok", dice=dice, dice_cases=dict.fromkeys(dice, 1))
            for name, dice in sites.items()
        },
        aggregation_error=None,
        state_digest="",
        seconds=1.0,
    )


def lines(*means: float) -> list[RoundLine]:
    return [line(k, a={"x": m}, b={"x": m}) for k, m in enumerate(means, start=1)]


def test_the_best_round_is_chosen() -> None:
    number, reason = choose_round(lines(0.5, 0.6, 0.7, 0.65), SETTINGS)
    assert number == 2
    assert "round 2 has the largest gain in mean Dice" in reason


def test_no_gain_is_no_release() -> None:
    number, reason = choose_round(lines(0.5, 0.5, 0.49), SETTINGS)
    assert number is None
    assert "no state passed the gate" in reason
    assert "does not rise (0.500 to 0.490)" in reason


def test_a_label_that_falls_at_one_site_stops_a_state_that_gains_on_average() -> None:
    rounds = [
        line(1, a={"x": 0.5, "y": 0.8}, b={"x": 0.5, "y": 0.8}),
        line(2, a={"x": 0.9, "y": 0.7}, b={"x": 0.9, "y": 0.8}),
        line(3, a={"x": 0.8, "y": 0.76}, b={"x": 0.8, "y": 0.8}),
    ]
    assert "y of a falls from 0.800 to 0.700" in why_not({"a": {"y": 0.8}}, {"a": {"y": 0.7}}, 0.05)
    assert choose_round(rounds, SETTINGS)[0] == 2  # within the margin, and better on average


def test_only_what_was_measured_for_both_is_compared() -> None:
    other = {"a": {"x": 0.59, "y": 0.95}}
    assert "does not rise" in why_not({"a": {"x": 0.60, "y": None}}, other, 0.05)


def test_a_site_that_never_measured_the_base_is_not_passed_over() -> None:
    late = {"a": {"x": 0.7}, "b": {"x": 0.05}}  # b was silent when the base was measured
    assert why_not({"a": {"x": 0.6}}, late, 0.05) == (
        "b has never measured the base, so nobody knows what it would lose"
    )
    assert why_not({"a": {"x": 0.6}}, late | {"b": {"x": None}}, 0.05) == ""  # nobody to ask there


def test_a_measurement_that_vanishes_is_not_a_gain() -> None:
    reason = why_not({"a": {"x": 0.5}}, {"a": {"x": None}}, 0.05)
    assert reason == "x of a was measured for the base but not for this state"


def test_without_any_measurement_nothing_is_released_unless_the_settings_say_so() -> None:
    rounds = [line(1, a={"x": None}), line(2, a={"x": None})]
    assert choose_round(rounds, SETTINGS) == (
        None,
        "no state passed the gate: round 1: no site measured a Dice for the base and for this "
        "state",
    )
    number, reason = choose_round(rounds, RunSettings(gate="none"))
    assert number == 1
    assert "without a gate as the settings say" in reason
