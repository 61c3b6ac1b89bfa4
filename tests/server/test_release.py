"""What is released, and the words for why; the gate itself is in ``test_acceptance.py``."""

from dafne_federated.core.run_folder import RoundLine
from dafne_federated.core.settings import RunSettings
from dafne_federated.server.release import choose_round
from tests.server.test_acceptance import NOTHING, both, line

SETTINGS = RunSettings(margin=0.05)


def lines(*gains: float) -> list[RoundLine]:
    rounds = [line(1, a=NOTHING, b=NOTHING)]
    return rounds + [
        line(k, a=both(gain, gain), b=both(gain, gain)) for k, gain in enumerate(gains, start=2)
    ]


def test_the_best_round_is_chosen_and_accepted_in_words() -> None:
    number, reason, decision = choose_round(lines(0.1, 0.2, 0.15), SETTINGS)
    assert number == 2
    assert reason == (
        "round 2 has the largest gain in mean Dice in the persons who choose; in 6 others, who "
        "accept, the mean rises by 0.200 and no label lost more than the margin"
    )
    assert decision is not None
    assert decision.accepted


def test_an_earlier_round_is_released_where_the_best_is_not_accepted() -> None:
    rounds = [*lines(0.1), line(3, a=both(0.3, -0.1), b=both(0.3, 0.4))]
    number, reason, _ = choose_round(rounds, SETTINGS)
    assert (number, "the next best: round 2 was not accepted" in reason) == (1, True)


def test_no_gain_is_no_release() -> None:
    number, reason, decision = choose_round(lines(0.0, -0.01), SETTINGS)
    assert (number, decision is not None) == (None, True)
    assert reason.startswith("no state passed the gate: round 1: the mean Dice of those who accept")
    assert "does not rise (-0.010)" in reason


def test_without_any_measurement_nothing_is_released_unless_the_settings_say_so() -> None:
    rounds = [line(1, a=({}, {})), line(2, a=({}, {}))]
    number, reason, _ = choose_round(rounds, SETTINGS)
    assert (number, "expected min-persons 3 who accept, got 0" in reason) == (None, True)
    number, reason, decision = choose_round(rounds, RunSettings(gate="none"))
    assert (number, decision) == (1, None)
    assert "without a gate as the settings say" in reason
