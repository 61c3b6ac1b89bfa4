"""A site compares with the state that a run started from, where that comes along, and the base."""

from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from flwr.app import RecordDict  # noqa: E402

from dafne_federated.core.paired_changes import told  # noqa: E402
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
def test_the_state_that_came_along_is_compared_with_and_then_the_base(
    ready: SiteUnderTest, plan: AdaptationPlan, local_rank: int
) -> None:
    start = {k: v + np.float32(0.1) for k, v in initial_state(plan, 0).items()}
    alone, base = (
        RoundReply.from_record(ready.round(plan, epochs=0, state=state))
        for state in (start, initial_state(plan, 0))
    )
    for _ in range(2):  # measured, then from the cache
        reply = ask(ready, plan, start, first=True, local_rank=local_rank)
        assert reply.status == "ok"
        sums = (reply.change_persons, reply.change_total, reply.change_squares)
        found = told(plan.labels, *sums, 2)
        for (_, accept), before in zip(found, (alone, base), strict=True):
            for label, new, old in zip(plan.labels, reply.dice, before.dice, strict=True):
                assert accept[label].mean == pytest.approx(new - old, abs=1e-12)
    assert len(list((ready.path / "cache" / "base-dice").glob("*.json"))) == 2
    itself = ask(ready, plan, other(plan), first=True)
    size = len(itself.change_total) // 2
    assert set(itself.change_total[:size]) == {0.0}
    assert itself.change_total[size:] == reply.change_total[size:]


def test_a_first_state_that_is_missing_is_refused(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    reply = ask(ready, plan, None, first=True)
    assert (reply.status, "no arrays" in reply.reason) == ("refused", True)
