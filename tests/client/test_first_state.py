"""A site that is asked to measures the first state beside that of the round, as if alone."""

from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from flwr.app import RecordDict  # noqa: E402

from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.state import State, initial_state  # noqa: E402
from dafne_federated.core.wire import RoundReply, RoundRequest  # noqa: E402
from dafne_federated.core.wire_arrays import state_record  # noqa: E402
from tests.client.conftest import SiteUnderTest  # noqa: E402


def other(plan: AdaptationPlan) -> State:
    """Return a state under which the network is another one."""
    generator = np.random.default_rng(0)
    state = initial_state(plan, 0)
    return {k: v + generator.normal(0, 0.5, v.shape).astype("f4") for k, v in state.items()}


def ask(site: SiteUnderTest, plan: AdaptationPlan, start: State | None, **changes: Any) -> Any:
    request = RoundRequest(
        run="0" * 32,
        round=2,
        base_digest=plan.base_digest,
        plan_digest=plan.digest,
        epochs=0,
        batch_size=4,
        learning_rate=0.01,
        seed=1,
        **changes,
    )
    content: RecordDict = request.to_record(state_record(plan, other(plan), request.wire))
    if start is not None:
        content["first"] = state_record(plan, start, request.wire)
    return RoundReply.from_record(site.ask(content, "evaluate.state"))


@pytest.mark.parametrize("local_rank", [0, 2])
def test_both_are_measured_as_if_each_came_alone(
    ready: SiteUnderTest, plan: AdaptationPlan, local_rank: int
) -> None:
    start = initial_state(plan, 0)
    alone = RoundReply.from_record(ready.round(plan, epochs=0, state=start))
    both = ask(ready, plan, start, first=True, local_rank=local_rank)
    assert both.status == "ok"
    assert (both.first_dice, both.first_dice_cases) == (alone.dice, alone.dice_cases)
    assert both.dice != both.first_dice
    without = ask(ready, plan, None, local_rank=local_rank)
    assert (without.dice, without.first_dice) == (both.dice, None)


def test_a_first_state_that_is_missing_is_refused(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    reply = ask(ready, plan, None, first=True)
    assert (reply.status, "no arrays" in reply.reason) == ("refused", True)
