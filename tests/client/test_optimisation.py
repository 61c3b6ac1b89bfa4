"""A site keeps its optimiser and its own part as the rounds go, and a retried round repeats."""

import logging
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

import dafne_federated.client.site as site_module  # noqa: E402
from dafne_federated.core.local_part import silenced  # noqa: E402
from dafne_federated.core.optimiser_state import load_optimiser  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.state import (  # noqa: E402
    State,
    initial_state,
    load_state,
    state_bytes,
    state_rank,
)
from dafne_federated.core.wire import RoundReply  # noqa: E402
from dafne_federated.core.wire_arrays import take_state  # noqa: E402
from tests.client.conftest import SiteUnderTest  # noqa: E402


def files(site: SiteUnderTest, pattern: str) -> list[str]:
    return sorted(path.name for path in site.path.glob(f"cache/{pattern}"))


def test_an_optimiser_is_kept_and_a_retried_round_starts_where_it_started(
    ready: SiteUnderTest, plan: AdaptationPlan, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)

    def ask(number: int, state: State, optimiser: str = "kept") -> State:
        return take_state(ready.round(plan, state=state, round=number, optimiser=optimiser), plan)

    first = ask(1, initial_state(plan, 0))
    assert "round 1: a fresh optimiser: there is no earlier round" in caplog.text
    fresh = ask(2, first, "fresh")
    assert files(ready, "optimisers/*/clinic/both/*") == ["round-0001.npz"]
    second = ask(2, first)
    assert state_bytes(plan, second) != state_bytes(plan, fresh)
    monkeypatch.setattr(site_module, "_KEPT", site_module._Kept())  # as after a kill
    assert state_bytes(plan, ask(2, first)) == state_bytes(plan, second)
    third = ask(3, second)
    # The server never saw the end of round 2: its file of round 3 is not looked at.
    assert state_bytes(plan, ask(3, second)) == state_bytes(plan, third)
    names = files(ready, "optimisers/*/clinic/both/*")
    assert names == ["round-0002.npz", "round-0003.npz"]
    (path,) = ready.path.glob("cache/optimisers/*/clinic/both/round-0002.npz")
    steps = load_optimiser(path).steps
    assert steps == 2 * 2  # eight slices in steps of four, two rounds
    path.write_bytes(path.read_bytes()[:-50])
    alone = ask(3, second)
    assert "round 3: a fresh optimiser: round-0002.npz: not what an optimiser knew" in caplog.text
    assert state_bytes(plan, alone) == state_bytes(plan, ask(3, second, "fresh"))


def test_each_set_of_trained_factors_has_its_own_optimiser(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    for number, moving in ((1, "b"), (2, "a"), (3, "b")):
        reply = ready.round(plan, round=number, trained=moving, sent=moving, optimiser="kept")
        assert RoundReply.from_record(reply).status == "ok"
    assert files(ready, "optimisers/*/clinic/a/*") == ["round-0002.npz"]
    assert files(ready, "optimisers/*/clinic/b/*") == ["round-0001.npz", "round-0003.npz"]
    for path in ready.path.glob("cache/optimisers/*/clinic/?/*"):
        moving = path.parent.name
        assert {key[-1] for key in load_optimiser(path).first if key[-2] == "/"} == {moving}


def test_a_proximal_term_comes_with_the_request(ready: SiteUnderTest, plan: AdaptationPlan) -> None:
    start = initial_state(plan, 0)
    sizes = []
    for proximal in (0.0, 1e3):
        state = take_state(ready.round(plan, epochs=4, state=start, proximal=proximal), plan)
        sizes.append(sum(float(np.sum((state[key] - start[key]) ** 2)) for key in start))
    assert sizes[1] < 0.5 * sizes[0]


def test_a_local_part_stays_and_the_dice_is_that_of_the_global_one(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    def ask(number: int, state: State, **more: Any) -> tuple[State, RoundReply]:
        content = ready.round(plan, state=state, round=number, local_rank=2, epochs=3, **more)
        return take_state(content, plan), RoundReply.from_record(content)

    first, reply = ask(1, initial_state(plan, 0))
    assert state_rank(plan, first) == plan.rank
    (kept,) = ready.path.glob("cache/personal/*/clinic/round-0001.npz")
    own = load_state(kept)[1]
    assert state_rank(plan, own) == plan.rank + 2
    for target in plan.targets:
        if target.low_rank:
            a, b = own[f"{target.key}/a"], own[f"{target.key}/b"]
            assert b[plan.rank :].any()
            np.testing.assert_array_equal(a[..., : plan.rank], first[f"{target.key}/a"])
    # What the site measures is the model for everybody, whatever its own part does.
    second, reply = ask(2, first)
    alone = RoundReply.from_record(ready.round(plan, state=first, epochs=0))
    assert reply.dice == pytest.approx(alone.dice, abs=1e-6)
    again, _ = ask(2, first)
    assert state_bytes(plan, again) == state_bytes(plan, second)
    kept.unlink()
    other, _ = ask(2, first)
    assert state_bytes(plan, other) != state_bytes(plan, second)
    assert any((own[key] != value).any() for key, value in silenced(own, 2).items())
