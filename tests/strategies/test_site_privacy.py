"""No site moves the mean of a round by more than clip / m, whatever it sends."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, moving_arrays
from dafne_federated.core.strategy_table import STRATEGY_TABLE, round_rule
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.site_privacy import bounded, moved_norm

Make = Callable[..., State]
CLIP = 0.5
ROUNDS = pytest.mark.parametrize(
    ("strategy", "number"), [("fedavg", 1), ("frozen-a", 1), ("alternating", 1), ("alternating", 2)]
)


def plan_of(small_plan: AdaptationPlan, strategy: str) -> AdaptationPlan:
    """Return the plan, without pairs where the strategy has none."""
    if STRATEGY_TABLE[strategy].pairs != "never":
        return small_plan
    arrays = tuple(target for target in small_plan.targets if not target.low_rank)
    return small_plan.model_copy(update={"targets": arrays})


def drawn(
    plan: AdaptationPlan, make_state: Make, moving: list[str]
) -> tuple[State, dict[str, Update]]:
    """Return what was sent and five updates of it: tiny, near the clip, large, huge, lopsided."""
    sent = {key: value for key, value in make_state(0).items() if key in plan.state_shapes()}
    updates = {}
    for number, size in enumerate((1e-3, 0.05, 1.0, 1e3, 1.0)):
        step = make_state(10 + number)
        state = dict(sent)
        for name in moving if number < 4 else moving[-1:]:
            state[name] = sent[name] + np.float32(size) * step[name]
        site = f"site-{number}"
        # What sites claim must not make them count for more.
        missing = {"0006/delta": (1, 2)} if number in (0, 1) else {}
        updates[site] = Update(site, state, 10**number, missing=missing)
    return sent, updates


@ROUNDS
def test_one_site_moves_the_mean_by_at_most_clip_over_m(
    strategy: str, number: int, small_plan: AdaptationPlan, make_state: Make
) -> None:
    plan = plan_of(small_plan, strategy)
    held = round_rule(strategy, number).held
    sent = {key: value for key, value in make_state(0).items() if key in plan.state_shapes()}
    moving = moving_arrays(plan, sent, held)
    assert moving == sorted(key for key in sent if key.split("/")[1] not in held)
    sent, updates = drawn(plan, make_state, moving)

    def mean(given: dict[str, Update]) -> State:
        chosen = bounded(list(given.values()), sent, moving, CLIP)
        return STRATEGIES[strategy](plan, chosen).state

    whole, reached = mean(updates), {}
    for site, update in updates.items():
        without = mean(updates | {site: replace(update, state=sent)})
        square = sum(float(np.sum((whole[k].astype("f8") - without[k]) ** 2)) for k in whole)
        reached[site] = np.sqrt(square) * len(updates) / CLIP
        assert reached[site] <= 1 + 1e-4
    # The bound is met, and what is shorter than it is left alone.
    assert [reached[f"site-{n}"] for n in (2, 3)] == pytest.approx([1, 1], rel=1e-4)
    length = moved_norm(updates["site-0"].state, sent, moving)
    assert reached["site-0"] == pytest.approx(length / CLIP, rel=0.05)


@ROUNDS
def test_the_mean_is_that_of_clipped_vectors_and_what_stood_still_keeps_its_bits(
    strategy: str, number: int, small_plan: AdaptationPlan, make_state: Make
) -> None:
    plan = plan_of(small_plan, strategy)
    sent = {key: value for key, value in make_state(0).items() if key in plan.state_shapes()}
    moving = moving_arrays(plan, sent, round_rule(strategy, number).held)
    sent, updates = drawn(plan, make_state, moving)
    result = STRATEGIES[strategy](plan, bounded(list(updates.values()), sent, moving, CLIP)).state
    expected: dict[str, np.ndarray] = {name: sent[name].astype(np.float64) for name in moving}
    for update in updates.values():
        change = np.concatenate([(update.state[n].astype("f8") - sent[n]).ravel() for n in moving])
        factor = min(1.0, CLIP / float(np.linalg.norm(change))) / len(updates)
        for name in moving:
            expected[name] = expected[name] + factor * (
                update.state[name].astype("f8") - sent[name]
            )
    for name in sent:
        if name in moving:
            np.testing.assert_allclose(result[name], expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert result[name].tobytes() == sent[name].tobytes()


def test_clipping_holds_no_arrays_of_its_own(small_plan: AdaptationPlan, make_state: Make) -> None:
    moving = moving_arrays(small_plan, make_state(0), ("a",))
    sent, updates = drawn(small_plan, make_state, moving)
    chosen = bounded(list(updates.values()), sent, moving, CLIP)
    assert chosen[-1].state is sent
    assert all(update.state is updates[update.site].state for update in chosen[:-1])
    assert sum(update.cases * update.share for update in chosen) == pytest.approx(len(updates))
    short = [update for update in updates.values() if update.site == "site-0"]
    assert [update.share for update in bounded(short, sent, moving, CLIP)] == [1.0]
