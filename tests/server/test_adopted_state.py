"""A model that somebody retrained takes part in a run, adopted, as what a site trained does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from dafne_federated.core.adopted_state import adopt
from dafne_federated.core.errors import StateError
from dafne_federated.core.model_file import parse_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, check_state, fold, without_factors
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.core.wire import RoundReply, RoundRequest
from dafne_federated.core.wire_arrays import state_record, take_state
from dafne_federated.server.rounds import run_rounds
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update
from tests.server.conftest import base_bytes, grid_of

Make = Callable[..., Any]


def retrained(plan: AdaptationPlan) -> tuple[Any, Any]:
    """A base of a plan, and a model that differs from it in all weights."""
    base = parse_model(base_bytes(plan))
    generator = np.random.default_rng(5)
    weights = {
        key: (array + np.abs(generator.normal(0, 0.1, array.shape))).astype(np.float32)
        for key, array in base.weights.items()
    }
    return base, replace(base, digest="", weights=weights)


def sends(plan: AdaptationPlan, state: State) -> Callable[[Message, RecordDict], RecordDict]:
    """Return what makes a site train to this state in each round; statistics stay as sent."""

    def change(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type != "train.round":
            return content
        request = RoundRequest.from_record(message.content)
        reply = RoundReply.from_record(content)
        sent = take_state(message.content, plan, request.wire)
        trained = {key: state[key] for key in plan.state_shapes(trained=True)}
        kept = without_factors(sent | trained, request.rule.absent)
        return reply.to_record(state_record(plan, kept, request.wire))

    return change


def test_a_run_uses_it_like_the_update_of_any_site(new_pool: Make) -> None:
    results = []
    for adopting in (False, True):
        folder = new_pool(rounds=1)
        plan = folder.plan()
        grid = grid_of(folder)
        base, model = retrained(plan)
        adopted = adopt(base, model, plan)
        if adopting:
            list(grid.sites.values())[1].change = sends(plan, adopted.state)
        run_rounds(grid, folder)
        line = folder.rounds()[0]
        assert {site.status for site in line.sites.values()} == {"ok"}
        assert all(site.share > 0 for site in line.sites.values())
        results.append(folder.state_after(1))
    check_state(plan, results[1])
    assert any(not np.array_equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name", [n for n, r in STRATEGY_TABLE.items() if r.pairs != "never"])
def test_strategies_take_it_unless_they_need_a_factor_that_all_share(
    small_plan: AdaptationPlan, make_state: Callable[..., State], name: str
) -> None:
    plan = small_plan.model_copy(update={"base_digest": parse_model(base_bytes(small_plan)).digest})
    base, model = retrained(plan)
    absent = STRATEGY_TABLE[name].odd.personal
    adopted = without_factors(adopt(base, model, plan).state, absent)
    others = [without_factors(make_state(seed), absent) for seed in (1, 2)]
    states = (adopted, *others)
    updates = [Update(f"site {i}", state, 3) for i, state in enumerate(states)]
    if name in ("frozen-a", "alternating"):
        with pytest.raises(StateError, match=r"to be the same at all sites.*take strategy 'prod"):
            STRATEGIES[name](plan, updates)
        return
    combined = STRATEGIES[name](plan, updates).state
    assert set(adopted) <= set(combined)
    head = np.mean([state["0006/delta"] for state in states], axis=0)
    np.testing.assert_allclose(combined["0006/delta"], head, atol=1e-6)


def test_half_of_it_is_half_of_the_change(small_plan: AdaptationPlan) -> None:
    wide = small_plan.model_copy(
        update={
            "base_digest": parse_model(base_bytes(small_plan)).digest, "rank": 8, "max_rank": 8,
        }
    )  # fmt: skip
    base, model = retrained(wide)
    nothing = {key: np.zeros(s, np.float32) for key, s in wide.state_shapes().items()}
    adopted = adopt(base, model, wide)
    updates = [Update("adopted", adopted.state, 1), Update("still", nothing, 1)]
    weights = fold(base.weights, wide, STRATEGIES["product"](wide, updates).state)
    for target in wide.targets:
        middle = (base.weights[target.key] + model.weights[target.key]) / 2
        np.testing.assert_allclose(weights[target.key], middle, atol=1e-5)
