"""No label falls further than the margin at any site, and who chose a round does not accept it."""

import itertools
from collections.abc import Callable

import pytest

from dafne_federated.core.gate_decision import GateDecision
from dafne_federated.core.paired_changes import Changes, PairedChange
from dafne_federated.core.run_folder import RoundLine, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.server.acceptance import REFERENCE, accept, decide

SETTINGS = RunSettings(margin=0.05, confidence=0.95, min_persons=3)


def change(*values: float) -> PairedChange:
    return PairedChange(
        persons=len(values), total=sum(values), squares=sum(value**2 for value in values)
    )


def line(number: int, whole: bool = True, **sites: tuple[Changes, Changes]) -> RoundLine:
    return RoundLine(
        round=number,
        trained=True,
        sites={
            name: SiteRound(status="ok", choose=parts[0], accept=parts[1])
            for name, parts in sites.items()
        },
        aggregation_error=None,
        state_digest="",
        seconds=1.0,
        whole=whole,
    )


def both(choose: float, accepted: float) -> tuple[Changes, Changes]:
    return {"x": change(choose)}, {"x": change(accepted, accepted, accepted)}


NOTHING = both(0, 0)


def test_a_state_that_gains_everywhere_is_accepted() -> None:
    decision = accept({"a": {"x": change(0.1, 0.12)}, "b": {"x": change(0.2)}}, SETTINGS)
    assert (decision.accepted, decision.reason, decision.persons) == (True, "", 3)
    assert decision.change == pytest.approx((0.11 + 0.2) / 2)
    assert [(own.site, own.persons, own.falls) for own in decision.lines] == [
        ("", 3, False), ("a", 2, False), ("b", 1, False),
    ]  # fmt: skip


def test_one_label_of_one_site_holds_back_what_gains_on_average() -> None:
    changes = {
        "a": {"x": change(0.3, 0.3), "y": change(0.2, 0.2)},
        "b": {"x": change(0.3), "y": change(-0.06)},
    }
    assert accept(changes, SETTINGS).reason == "y of b falls by 0.060 (1 person)"
    assert accept(changes, SETTINGS.model_copy(update={"margin": 0.07})).accepted


def test_from_five_persons_on_the_interval_decides() -> None:
    wide = change(0.5, -0.3, 0.4, -0.3, 0.3)  # a mean of +0.12 that may as well be a fall
    narrow = change(0.12, 0.11, 0.13, 0.12, 0.12)
    assert accept({"a": {"x": narrow}}, SETTINGS).accepted
    reason = accept({"a": {"x": wide}}, SETTINGS).reason
    assert "x of a may fall by more than 0.05 (+0.120 on average in 5 persons" in reason
    assert "not less than -0.25" in reason
    # Four of them have no interval, and their mean alone speaks.
    assert accept({"a": {"x": change(0.5, -0.3, 0.4, -0.3)}}, SETTINGS).accepted


def test_persons_of_small_sites_have_an_interval_together() -> None:
    sites = {f"s{n}": {"x": change(value)} for n, value in enumerate((0.4, -0.04, 0.4, -0.04, 0))}
    (first, *_) = accept(sites, SETTINGS).lines
    assert (first.site, first.persons, first.lower is not None) == ("", 5, True)
    assert first.falls


def test_more_confidence_and_a_smaller_margin_never_accept_more() -> None:
    changes = {"a": {"x": change(0.02, -0.03, 0.05, 0.01, 0.03)}}
    margins, confidences = (0.2, 0.05, 0.02, 0.01, 0.0), (0.6, 0.9, 0.95, 0.999)
    found = {
        (m, c): accept(changes, RunSettings(margin=m, confidence=c)).accepted
        for m, c in itertools.product(margins, confidences)
    }
    assert set(found.values()) == {True, False}
    for (m, c), accepted in found.items():
        if accepted:
            assert all(ok for (n, d), ok in found.items() if n >= m and d <= c)


def test_a_mean_that_does_not_rise_is_not_released() -> None:
    flat = {"a": {"x": change(0.0, 0.0, 0.0)}}
    assert "does not rise (+0.000)" in accept(flat, SETTINGS).reason


def test_too_few_persons_decide_nothing_unless_there_is_a_reference_folder() -> None:
    few = {"a": {"x": change(0.2, 0.2)}}
    decision = accept(few, SETTINGS)
    assert (decision.accepted, decision.few) == (False, True)
    assert "expected min-persons 3 who accept, got 2" in decision.reason
    assert accept({}, SETTINGS).few
    rounds = [line(1, a=({}, {"x": change(0.0, 0.0)})), line(2, a=({}, few["a"]))]
    assert decide(rounds, SETTINGS)[0] is None

    def reference(gain: float) -> Callable[[int], tuple[Changes, ...]]:
        return lambda _: ({"x": change(gain, gain, gain)},)

    number, decision = decide(rounds, SETTINGS, reference(0.1))
    assert (number, decision.persons) == (1, 5)
    assert [own.site for own in decision.lines] == ["", REFERENCE, "a"]
    number, decision = decide(rounds, SETTINGS, reference(-0.1))
    assert (number, f"x of {REFERENCE} falls by 0.100" in decision.reason) == (None, True)


def test_the_reference_folder_holds_back_what_the_sites_accept() -> None:
    rounds = [line(1, a=NOTHING), line(2, a=both(0.1, 0.1))]
    assert decide(rounds, SETTINGS)[0] == 1
    fallen: Changes = {"x": change(-0.3, -0.3)}
    assert decide(rounds, SETTINGS, lambda _: (fallen,))[0] is None


def test_those_who_choose_choose_and_those_who_accept_do_not() -> None:
    rounds = [
        line(1, a=NOTHING),
        line(2, a=both(0.3, 0.1)),
        line(3, a=both(0.2, 0.9)),  # the best to those who accept
        line(4, a=both(0.1, 0.2)),
    ]
    number, decision = decide(rounds, SETTINGS)
    assert (number, decision.looked_at) == (1, (1,))


def test_what_is_not_accepted_gives_way_to_the_next_best_but_not_for_ever() -> None:
    rounds = [line(1, a=NOTHING)]
    rounds += [line(n, a=both(0.1 * (9 - n), -0.2)) for n in (2, 3)]
    assert decide([*rounds, line(4, a=both(0.1, 0.2))], SETTINGS)[0] == 3
    rounds.append(line(4, a=both(0.1 * 5, -0.2)))
    number, decision = decide([*rounds, line(5, a=both(0.1, 0.2))], SETTINGS)
    assert (number, decision.looked_at) == (None, (1, 2, 3))
    assert decision.reason.startswith("round 1: x of a falls by 0.200 (3 persons)")


def test_where_nobody_chooses_the_last_whole_round_is_looked_at_first() -> None:
    rounds = [line(n, a=({}, both(0, 0.1)[1])) for n in (1, 2, 3)]
    assert decide(rounds, SETTINGS)[0] == 2
    assert decide([*rounds, line(4, whole=False, a=({}, both(0, 0.1)[1]))], SETTINGS)[0] == 2


def test_a_measurement_that_vanishes_is_not_a_gain() -> None:
    rounds = [line(1, a=NOTHING, b=NOTHING), line(2, a=both(0.1, 0.1))]
    number, decision = decide(rounds, SETTINGS)
    assert number is None
    assert decision.reason == "round 1: x of b was measured in round 1 but not of this state"


def test_a_site_without_validation_persons_has_no_say() -> None:
    silent: tuple[Changes, Changes] = ({}, {})
    rounds = [line(1, a=NOTHING, b=silent), line(2, a=both(0.1, 0.1), b=silent)]
    assert decide(rounds, SETTINGS)[0] == 1


def with_base(number: int, *parts: tuple[Changes, Changes]) -> RoundLine:
    """Return a line of one site that compared with a release, and with the base."""
    (choose, accepted), (choose_base, accept_base) = parts
    site = SiteRound(
        status="ok",
        choose=choose,
        accept=accepted,
        choose_base=choose_base,
        accept_base=accept_base,
    )
    return line(number).model_copy(update={"sites": {"a": site}})


def test_after_a_release_a_round_has_to_pass_against_the_base_as_well() -> None:
    """And so nothing that only one of both refuses is ever released."""
    first, nobody = with_base(1, NOTHING, NOTHING), ({}, {})
    for start, base in itertools.product((0.1, 0.0, -0.2), repeat=2):
        rounds = [first, with_base(2, both(0.1, start), both(0.1, base))]
        number, decision = decide(rounds, SETTINGS, from_release=True)
        assert (number is not None) == (start > 0 and base > 0) == decision.accepted
        assert decision.against == "start"
        assert (decision.base is None) == (start <= 0)
        if start > 0 >= base:
            assert "round 1: against the base: " in decision.reason
        assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    number, decision = decide(
        [first, with_base(2, both(0.1, 0.1), nobody)], SETTINGS, from_release=True
    )
    assert (number, decision.few) == (None, True)
    assert "against the base: too few validation persons" in decision.reason


def test_after_a_release_the_reference_folder_looks_at_both() -> None:
    good, fallen = ({"x": change(gain, gain, gain)} for gain in (0.1, -0.1))
    rounds = [line(n, a=({}, {})) for n in (1, 2)]
    for found in itertools.product((good, fallen), repeat=2):
        number, _ = decide(rounds, SETTINGS, lambda _, found=found: found, from_release=True)  # type: ignore[misc]
        assert (number is not None) == (found == (good, good))


def test_a_decision_is_kept_as_it_was() -> None:
    _, decision = decide([line(1, a=NOTHING), line(2, a=both(0.1, 0.1))], SETTINGS)
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision


def test_where_few_accept_with_a_label_at_a_site_the_others_are_looked_at_for_a_fall() -> None:
    changes: dict[str, Changes] = {name: {"x": change(0.1)} for name in "abc"}
    changes["a"] = {"x": change(-0.09)}
    assert accept(changes, SETTINGS).reason.startswith("x of a falls by 0.090 (1 person)")
    for others, reason in ((0.01, ""), (-0.02, "x of a falls by 0.055 (2 persons)")):
        decision = accept(changes, SETTINGS, {"a": {"x": change(others)}})
        assert decision.reason == reason
        assert (decision.persons, decision.change) == (3, pytest.approx(0.11 / 3))
        assert [own.persons for own in decision.lines] == [3, 2, 1, 1]
    many: dict[str, Changes] = {"a": {"x": change(-0.06, -0.06, -0.06)}, "b": {"x": change(0.9)}}
    assert "x of a falls" in accept(many, SETTINGS, {"a": {"x": change(0.5)}}).reason


def test_a_label_that_only_those_who_choose_have_must_not_fall_there() -> None:
    accepted: Changes = {"x": change(0.1, 0.1, 0.1)}
    for fall, reason in ((-0.02, ""), (-0.06, "y of a falls by 0.060 (1 person), and 1 more")):
        decision = accept({"a": accepted}, SETTINGS, {"a": {"x": change(-0.9), "y": change(fall)}})
        assert decision.reason == reason
        # They are neither counted nor in the mean, and do not speak beside one who accepts.
        assert (decision.persons, decision.change) == (3, pytest.approx(0.1))
        assert {own.label: own.persons for own in decision.lines if own.site} == {"x": 3, "y": 1}
    rounds = [line(1, a=NOTHING), line(2, a=({"x": change(0.1), "y": change(-0.06)}, accepted))]
    number, decision = decide(rounds, SETTINGS)
    assert (number, "y of a falls" in decision.reason) == (None, True)
