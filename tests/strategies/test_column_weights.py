"""A column of the output layer is the mean of the sites that annotated its label."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dafne_federated.core.errors import MessageError, StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State
from dafne_federated.core.strategy_table import COORDINATE_RULES
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update, mean_arrays
from dafne_federated.strategies.column_weights import (
    check_missing,
    column_weights,
    missing_columns,
)
from dafne_federated.strategies.robust import ROBUST_RULES

Make = Callable[..., State]
HEAD = "0006/delta"  # (1, 1, 4, 3): background, bright, dark
CASES = (3, 1, 10)


@pytest.fixture(scope="module")
def plan(small_plan: AdaptationPlan) -> AdaptationPlan:
    return small_plan.model_copy(update={"output": ("0006",)})


def updates_of(plan: AdaptationPlan, make: Make, *missing: tuple[int, ...]) -> list[Update]:
    return [
        Update(f"site {n}", make(n), CASES[n], missing=missing_columns(plan, channels))
        for n, channels in enumerate(missing)
    ]


def test_sites_that_lack_a_label_have_no_weight_in_its_column(
    plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates_of(plan, make_state, (), (2,), (1,))
    found = mean_arrays(ups, [HEAD])[HEAD].astype(np.float64)
    values = [u.state[HEAD].astype(np.float64) for u in ups]
    want = (3 * values[0] + 1 * values[1] + 10 * values[2]) / 14
    want[..., 1] = ((3 * values[0] + 1 * values[1]) / 4)[..., 1]
    want[..., 2] = ((3 * values[0] + 10 * values[2]) / 13)[..., 2]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_else_is_averaged_as_ever_in_any_order(
    name: str, plan: AdaptationPlan, make_state: Make
) -> None:
    if name == "fedavg":
        plan = plan.model_copy(update={"targets": plan.targets[-1:]})
    held = make_state(9)
    keys = plan.state_shapes().keys()
    ups = [
        replace(u, state={k: held[k] if k.endswith("/a") else u.state[k] for k in keys})
        for u in updates_of(plan, make_state, (), (2,), ())
    ]
    whole = STRATEGIES[name](plan, [replace(u, missing={}) for u in ups]).state
    first, *others = (
        STRATEGIES[name](plan, list(order)).state for order in itertools.permutations(ups)
    )
    for key, value in first.items():
        assert all(np.array_equal(value, other[key]) for other in others)
        same = value == whole[key]
        if key == HEAD:
            assert same[..., :2].all()
            assert not same[..., 2].any()
        else:
            assert same.all()


@pytest.mark.parametrize("rule", sorted(ROBUST_RULES.keys() - {*COORDINATE_RULES}))
def test_robust_rules_keep_what_a_site_lacks(
    rule: str, plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates_of(plan, make_state, (2,), (), (1,))
    lacked = {u.site: u.missing for u in ups}
    chosen = ROBUST_RULES[rule](plan, ups, 0, ups[0].state)
    assert {u.site: u.missing for u in chosen if u.site} == lacked or rule == "krum"
    assert all(u.missing == lacked[u.site] for u in chosen if u.site)


def test_weight_clipped_off_a_site_that_lacks_a_label_does_not_hold_its_column(
    plan: AdaptationPlan, make_state: Make
) -> None:
    sent = make_state(0)
    near, far = ({k: v + step for k, v in sent.items()} for step in (0.01, 100.0))
    lacks = missing_columns(plan, (2,))
    ups = [Update("a", near, 1), Update("b", far, 10, missing=lacks)]
    chosen = ROBUST_RULES["clipped"](plan, ups, 0, sent)
    assert any(not update.site for update in chosen)
    column = mean_arrays(chosen, [HEAD])[HEAD][..., 2]
    np.testing.assert_allclose(column, near[HEAD][..., 2], rtol=1e-5)


def test_nobody_has_more_than_half_of_a_column_that_three_annotated() -> None:
    weights = [0.5, 30 / 80, 5 / 80, 5 / 80]
    found = np.array(column_weights(weights, [(), (1,), (), ()], 2))
    np.testing.assert_array_equal(found[:, 0], weights)
    np.testing.assert_allclose(found[:, 1], [0.5, 0.0, 0.25, 0.25])
    two = np.array(column_weights([0.5, 0.25, 0.25], [(), (1,), ()], 2))
    np.testing.assert_allclose(two[:, 1], [2 / 3, 0.0, 1 / 3])  # two have no majority


def test_one_site_is_a_fixed_point_and_so_is_a_column_that_all_lack(
    plan: AdaptationPlan, make_state: Make
) -> None:
    (only,) = updates_of(plan, make_state, (2,))
    np.testing.assert_array_equal(mean_arrays([only], [HEAD])[HEAD], only.state[HEAD])
    ups = updates_of(plan, make_state, (2,), (2,), (2,))
    plain = mean_arrays([replace(u, missing={}) for u in ups], [HEAD])[HEAD]
    np.testing.assert_array_equal(mean_arrays(ups, [HEAD])[HEAD], plain)


def test_a_label_that_one_site_has_is_its_own_bit_for_bit(
    plan: AdaptationPlan, make_state: Make
) -> None:
    ups = updates_of(plan, make_state, (2,), (), (2,))
    found = mean_arrays(ups, [HEAD])[HEAD]
    np.testing.assert_array_equal(found[..., 2], ups[1].state[HEAD][..., 2])


def test_weights_are_untouched_where_nothing_is_missing() -> None:
    weights = [0.1, 0.2, 0.7]
    assert column_weights(weights, [(), (), ()], 3) == weights
    each = np.array(column_weights(weights, [(), (2,), ()], 3))
    assert (each[:, :2] == np.array(weights)[:, np.newaxis]).all()
    np.testing.assert_allclose(each[:, 2], [0.125, 0, 0.875])


def test_only_whole_arrays_of_the_output_layer_have_such_columns(
    plan: AdaptationPlan, small_plan: AdaptationPlan
) -> None:
    assert missing_columns(plan, (1,)) == {HEAD: (1,)}
    assert missing_columns(plan, ()) == {}
    assert missing_columns(small_plan, (1,)) == {}  # a plan from before


@pytest.mark.parametrize("missing", [(0,), (3,), (2, 1), (1, 1), (1, 2)])
def test_impossible_claims_are_refused(missing: tuple[int, ...], plan: AdaptationPlan) -> None:
    with pytest.raises(StateError, match="missing labels: expected some of 1 to 2 in order"):
        check_missing(plan, missing)


def test_an_output_layer_of_another_form_is_refused_and_old_plans_keep_their_digest(
    plan: AdaptationPlan, small_plan: AdaptationPlan
) -> None:
    assert '"output"' not in small_plan.to_json()
    assert AdaptationPlan.from_json(small_plan.to_json()) == small_plan
    assert AdaptationPlan.from_json(plan.to_json()) == plan
    wrong = plan.to_json().replace('"output":["0006"]', '"output":["0004"]')
    with pytest.raises(MessageError, match="whole arrays with 3 channels last, got dense"):
        AdaptationPlan.from_json(wrong)
