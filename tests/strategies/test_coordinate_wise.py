"""Rules that take each value by itself: what they bear, and what they leave as it is."""

from collections.abc import Callable

import numpy as np
import pytest

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State
from dafne_federated.core.strategy_table import COORDINATE_RULES
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.column_weights import missing_columns
from dafne_federated.strategies.robust import ROBUST_RULES

Make = Callable[..., State]
HEAD = "0006/delta"  # (1, 1, 4, 3)
RULE = pytest.mark.parametrize("rule", COORDINATE_RULES)


@pytest.fixture
def updates(small_plan: AdaptationPlan, make_state: Make) -> list[Update]:
    """Return five updates that share factor a."""
    common = make_state(0)
    return [
        Update(f"site {n}", common | {k: v for k, v in make_state(n).items() if k[-2:] != "/a"}, n)
        for n in range(1, 6)
    ]


def stack(updates: list[Update], name: str) -> np.ndarray:
    return np.stack([update.state[name].astype(np.float64) for update in updates])


def test_they_are_the_median_and_the_trimmed_mean_of_numpy(
    small_plan: AdaptationPlan, updates: list[Update]
) -> None:
    (median,) = ROBUST_RULES["median"](small_plan, updates, 2, {})
    (trimmed,) = ROBUST_RULES["trimmed-mean"](small_plan, updates, 1, {})
    for name in updates[0].state:
        every = stack(updates, name)
        np.testing.assert_allclose(median.state[name], np.median(every, axis=0), rtol=1e-6)
        cut = np.sort(every, axis=0)[1:-1].mean(axis=0)
        np.testing.assert_allclose(trimmed.state[name], cut, rtol=1e-5, atol=1e-7)


@RULE
@pytest.mark.parametrize("bad", [1, 2])
def test_bad_sites_leave_every_value_within_those_of_the_good_ones(
    rule: str, bad: int, small_plan: AdaptationPlan, updates: list[Update]
) -> None:
    good = updates[bad:]
    lies = [
        Update(u.site, {k: v if k[-2:] == "/a" else v * -1e4 for k, v in u.state.items()}, 10**6)
        for u in updates[:bad]
    ]
    (chosen,) = ROBUST_RULES[rule](small_plan, [*lies, *good], bad, {})
    state = STRATEGIES["frozen-a"](small_plan, [chosen]).state
    for name, value in state.items():
        every = stack(good, name)
        assert (value >= every.min(axis=0) - 1e-6).all()
        assert (value <= every.max(axis=0) + 1e-6).all()


@RULE
def test_a_factor_that_all_share_keeps_its_bits(
    rule: str, small_plan: AdaptationPlan, updates: list[Update]
) -> None:
    (chosen,) = ROBUST_RULES[rule](small_plan, updates, 1, {})
    common = [name for name in updates[0].state if name.endswith("/a")]
    assert common
    assert all(np.array_equal(chosen.state[name], updates[0].state[name]) for name in common)


@RULE
def test_a_column_is_that_of_the_sites_that_annotated_its_label(
    rule: str, small_plan: AdaptationPlan, updates: list[Update]
) -> None:
    plan = small_plan.model_copy(update={"output": ("0006",)})
    lacks = missing_columns(plan, (2,))
    some = [Update(u.site, u.state, u.cases, missing=lacks) for u in updates[:2]] + updates[2:]
    (whole,) = ROBUST_RULES[rule](plan, updates, 1, {})
    (masked,) = ROBUST_RULES[rule](plan, some, 1, {})
    (those,) = ROBUST_RULES[rule](plan, updates[2:], 1, {})
    np.testing.assert_array_equal(masked.state[HEAD][..., :2], whole.state[HEAD][..., :2])
    if rule == "median":
        np.testing.assert_array_equal(masked.state[HEAD][..., 2], those.state[HEAD][..., 2])
    assert not np.array_equal(masked.state[HEAD][..., 2], whole.state[HEAD][..., 2])
