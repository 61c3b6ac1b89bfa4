"""A site does only what its people agreed to, and nothing of it leaks when something fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from flwr.app import RecordDict  # noqa: E402

from dafne_federated.client.base_review import (  # noqa: E402
    approve_base,
    find_base,
    waiting_bases,
    withdraw_base,
)
from dafne_federated.client.limits import Clock  # noqa: E402
from dafne_federated.client.site_settings import read_site  # noqa: E402
from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402
from dafne_federated.core.errors import ApprovalError  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.core.new_run import make_plan  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.core.slices import PreparedSlices  # noqa: E402
from dafne_federated.core.state import State, initial_state, state_bytes, state_rank  # noqa: E402
from dafne_federated.core.strategy_table import RoundRule  # noqa: E402
from dafne_federated.core.wire import RoundReply  # noqa: E402
from dafne_federated.core.wire_arrays import take_state  # noqa: E402
from tests.client.conftest import MakeSite, SiteUnderTest  # noqa: E402


def started(plan: AdaptationPlan) -> State:
    """Return a state in which both factors have a gradient."""
    generator = np.random.default_rng(0)
    state = initial_state(plan, 0)
    return {
        key: generator.normal(0, 0.02, value.shape).astype("f4") if key.endswith("/b") else value
        for key, value in state.items()
    }


def test_nothing_happens_without_approval(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any
) -> None:
    site = make_site()
    reply = site.offer(plan)
    assert (reply.status, "is not approved at this site" in reply.reason) == ("refused", True)
    answer = site.send_base(trained.path.read_bytes(), plan.base_digest)
    assert (answer.status, "not approved" in answer.reason) == ("refused", True)
    assert not list(site.path.glob("cache/**/*.model"))
    reply_ = RoundReply.from_record(site.round(plan))
    assert (reply_.status, "never offered" in reply_.reason) == ("refused", True)


def test_an_unknown_base_comes_to_be_looked_at_and_nothing_more(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any, tmp_path: Path
) -> None:
    site = make_site(inbox=str(tmp_path / "inbox"))
    data = trained.path.read_bytes()
    assert site.offer(plan).status == "need"
    damaged = site.send_base(data[:-1] + b"!", plan.base_digest)
    assert "expected digest" in damaged.reason
    answer = site.send_base(data, plan.base_digest)
    words = f"base model {plan.base_digest[:16]} waits for approval at this site"
    assert (answer.status, answer.reason) == ("refused", words)
    assert (site.offer(plan).status, site.offer(plan).reason) == ("refused", words)
    assert [path.read_bytes() for path in site.path.glob("inbox/*")] == [data]
    assert not list(site.path.glob("cache/**/*.model"))
    settings = read_site(site.path / "site.json")
    (waiting,) = waiting_bases(settings)
    assert (waiting.name, waiting.labels) == ("Squares", ("bright", "dark"))
    approve_base(settings, find_base(settings, plan.base_digest[:10]), "test")
    assert site.offer(plan).status == "have"
    assert waiting_bases(settings) == []
    withdraw_base(settings, plan.base_digest[:8])
    assert site.offer(plan).status == "need"


def test_a_doctored_base_is_not_kept(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any
) -> None:
    site = make_site()
    site.approvals.add(read_model(trained.path), "test")
    site.offer(plan)
    reply = site.send_base(trained.path.read_bytes()[:-1] + b"!", plan.base_digest)
    assert (reply.status, "expected digest" in reply.reason) == ("refused", True)
    assert site.offer(plan).status == "need"


def test_a_base_that_was_changed_on_disk_is_not_used(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    (path,) = ready.path.glob("cache/bases/*.model")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert ready.offer(plan).status == "need"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"software": "9.9"}, "dafne-federated 0.1.0 at this site and 9.9 at the coordinator"),
        ({"base_digest": "c" * 64}, "belongs to another base"),
        ({"plan": "{}"}, "adaptation plan"),
    ],
)
def test_offers_that_do_not_fit_are_refused_in_words(
    ready: SiteUnderTest, plan: AdaptationPlan, changes: dict[str, Any], words: str
) -> None:
    reply = ready.offer(plan, changes)
    assert reply.status == "refused"
    assert words in reply.reason


def test_a_site_trains_at_its_own_rank(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any
) -> None:
    site = make_site(rank=3)
    site.approvals.add(read_model(trained.path), "test")
    assert site.offer(plan).rank == 3
    site.send_base(trained.path.read_bytes(), plan.base_digest)
    content = site.round(plan, state=initial_state(plan, 0, 3))
    assert state_rank(plan, take_state(content, plan)) == 3
    tight = plan.model_copy(update={"max_rank": 2})
    reply = site.offer(tight, {"plan": tight.to_json()})
    assert reply.reason == "this site trains at rank 3, the plan allows 2"


def test_the_sites_own_limits_hold(make_site: MakeSite, plan: AdaptationPlan, trained: Any) -> None:
    site = make_site(min_cases=3)
    site.approvals.add(read_model(trained.path), "test")
    assert "at least 3 training cases" in site.offer(plan).reason
    site = make_site(max_epochs=2)
    site.offer(plan)
    site.send_base(trained.path.read_bytes(), plan.base_digest)
    reply = RoundReply.from_record(site.round(plan, epochs=3))
    assert (reply.status, reply.reason) == ("refused", "this site trains at most 2 epochs a round")
    assert not list(site.path.glob("cache/slices/*"))  # nobody measured before it was refused
    site = make_site(methods=["norm", "bias"])
    words = "this site trains only by these methods: norm, bias; the run takes 'lora'"
    assert site.offer(plan).reason == words
    assert RoundReply.from_record(site.round(plan)).reason == words


def test_what_needs_longer_than_a_site_allows_is_refused_and_leaves_nothing(
    ready: SiteUnderTest, make_site: MakeSite, plan: AdaptationPlan
) -> None:
    content = ready.round(plan, optimiser="kept")
    assert RoundReply.from_record(content).status == "ok"
    before = {path: path.read_bytes() for path in ready.path.rglob("*") if path.is_file()}
    site = make_site(max_seconds=1e-6)
    content = site.round(plan, optimiser="kept", round=2)
    reply = RoundReply.from_record(content)
    words = "this site works at most 1e-06 s on a message, and this needs longer"
    assert (reply.status, reply.reason, "arrays" in content) == ("refused", words, False)
    (site.path / "site.json").write_bytes(before[site.path / "site.json"])
    assert before == {path: path.read_bytes() for path in site.path.rglob("*") if path.is_file()}
    site = make_site(max_seconds=1e6)
    again = take_state(site.round(plan), plan)
    assert state_bytes(plan, again) == state_bytes(plan, take_state(ready.round(plan), plan))


def test_time_is_looked_at_with_every_batch() -> None:
    shape = (2, 4, 4, 1)
    slices = PreparedSlices(np.zeros(shape, "f4"), np.zeros(shape, "u1"), np.ones(shape, "f4"), 2)
    assert Clock(None).over(slices) is slices
    one = np.array([1])
    for given, timed in zip(
        slices.batch(one)[0], Clock(60).over(slices).batch(one)[0], strict=True
    ):
        np.testing.assert_array_equal(given, timed)
    with pytest.raises(ApprovalError, match="works at most 1e-09 s"):
        Clock(1e-9).over(slices).batch(one)


def test_dice_and_loss_stay_where_the_site_says_so(
    ready: SiteUnderTest, make_site: MakeSite, plan: AdaptationPlan
) -> None:
    told = ready.round(plan)
    site = make_site(share_dice=False, share_loss=False)
    content = site.round(plan)
    reply = RoundReply.from_record(content)
    assert (reply.status, reply.dice_cases, reply.loss) == ("ok", [0, 0], None)
    assert set(reply.dice) == {0.0}
    assert RoundReply.from_record(told).loss is not None
    assert state_bytes(plan, take_state(content, plan)) == state_bytes(plan, take_state(told, plan))


def test_a_round_gives_an_update_and_the_dice_of_what_came(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    content = ready.round(plan, epochs=2)
    reply = RoundReply.from_record(content)
    assert (reply.status, reply.training_cases, reply.training_slices) == ("ok", 2, 8)
    assert reply.dice_cases == [1, 1]
    state = take_state(content, plan)
    assert state_bytes(plan, state) != state_bytes(plan, initial_state(plan, 0))
    again = take_state(ready.round(plan, epochs=2), plan)
    assert state_bytes(plan, again) == state_bytes(plan, state)  # same round, same bits
    other = take_state(ready.round(plan, epochs=2, round=2), plan)
    assert state_bytes(plan, other) != state_bytes(plan, state)


@pytest.mark.parametrize("moving", ["a", "b"])
def test_a_round_of_one_factor_moves_and_sends_that_one(
    ready: SiteUnderTest, plan: AdaptationPlan, moving: str
) -> None:
    rule, state = RoundRule(moving, moving), started(plan)
    content = ready.round(plan, state=state, trained=moving, sent=moving)
    found = take_state(content, plan, absent=rule.absent)
    assert {key[-1] for key in found if key[-2:] in ("/a", "/b")} == {moving}
    assert all((found[key] != state[key]).any() for key in found)


def test_factors_in_turn_are_compiled_once_each_and_give_the_bits_of_a_fresh_process(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    from dafne_federated.client import site as client_site

    state = started(plan)

    def ask(moving: str) -> dict[str, Any]:
        content = ready.round(plan, state=state, trained=moving, sent=moving)
        return take_state(content, plan, absent=RoundRule(moving, moving).absent)

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(np.array_equal(one[key], other[key]) for key in one)

    fresh = {}
    for moving in ("b", "a"):
        client_site._KEPT.engine = None
        fresh[moving] = ask(moving)
    client_site._KEPT.engine = None
    first = ask("b")
    engine = client_site._KEPT.engine
    assert engine is not None
    compiled = engine.trainings["b", 0.0, ()]
    assert same(ask("a"), fresh["a"])
    assert same(ask("b"), fresh["b"])
    assert same(first, fresh["b"])
    assert engine.trainings.keys() == {("a", 0.0, ()), ("b", 0.0, ())}
    assert engine.trainings["b", 0.0, ()] is compiled


def test_a_personal_factor_stays_and_is_used_again(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    from dafne_federated.core.state import load_state

    def ask(number: int) -> dict[str, Any]:
        content = ready.round(plan, state=shared, round=number, trained="both", sent="a")
        return take_state(content, plan, absent=("b",))

    shared = initial_state(plan, 0)
    first = ask(1)
    (kept,) = ready.path.glob("cache/personal/*/clinic/round-0001.npz")
    own = load_state(kept)[1]
    assert all(np.array_equal(own[key], first[key]) for key in first)
    assert any(value.any() for key, value in own.items() if key.endswith("/b"))
    second = ask(2)
    again = ask(2)  # the server died before the round ended: it starts where it started
    assert all(np.array_equal(second[key], again[key]) for key in second)
    kept.unlink()  # had b not been kept, the round would have gone another way
    fresh = ask(2)
    assert any((second[key] != fresh[key]).any() for key in second)
    ask(3)
    ask(4)
    names = sorted(path.name for path in ready.path.glob("cache/personal/*/clinic/*"))
    assert names == ["round-0003.npz", "round-0004.npz"]


def test_an_update_comes_in_the_type_that_was_asked_for(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    content = ready.round(plan, wire="float16")
    assert {array.dtype for array in content.array_records["arrays"].values()} == {"float16"}
    take_state(content, plan, "float16")
    for sent, wire in (("float32", "float16"), ("float16", "float32")):
        reply = RoundReply.from_record(ready.round(plan, sent_as=sent, wire=wire))
        assert reply.status == "refused"
        assert f"{wire}, got" in reply.reason


def test_evaluation_alone_sends_no_arrays(ready: SiteUnderTest, plan: AdaptationPlan) -> None:
    content = ready.round(plan, epochs=0)
    assert "arrays" not in content
    assert RoundReply.from_record(content).training_cases == 0


def test_prepared_slices_come_from_disk_the_second_time(
    ready: SiteUnderTest, plan: AdaptationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dafne_federated.client import site, site_data

    first = take_state(ready.round(plan), plan)
    for module in (site, site_data):
        monkeypatch.setattr(module, "_KEPT", module._Kept())  # as in a new process
    kept = sorted(ready.path.glob("cache/slices/*.npz"))
    assert len(kept) == 2
    kept[0].write_bytes(b"damaged")  # is prepared again
    second = take_state(ready.round(plan), plan)
    assert state_bytes(plan, first) == state_bytes(plan, second)


def test_a_failure_gives_nothing_away(
    ready: SiteUnderTest, plan: AdaptationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        msg = "/home/hospital/patient-name is gone"
        raise OSError(msg)

    monkeypatch.setattr(AdaptedNetwork, "write", fail)
    content = ready.round(plan)
    reply = RoundReply.from_record(content)
    assert reply.status == "failed"
    assert reply.reason == "the site could not do this; its own log says why"
    assert "patient" not in str(content)


def test_data_that_is_missing_gives_nothing_away(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any
) -> None:
    site = make_site(validation=["secret-name"])
    site.approvals.add(read_model(trained.path), "test")
    site.offer(plan)
    site.send_base(trained.path.read_bytes(), plan.base_digest)
    content = site.round(plan)
    assert RoundReply.from_record(content).status == "failed"
    assert "secret-name" not in str(content)


def test_approval_can_be_taken_back(ready: SiteUnderTest, plan: AdaptationPlan) -> None:
    assert RoundReply.from_record(ready.round(plan)).status == "ok"
    ready.approvals.path.unlink()
    reply = RoundReply.from_record(ready.round(plan))
    assert (reply.status, "not approved at this site" in reply.reason) == ("refused", True)


def test_not_even_broken_settings_give_a_path_away(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    ready.approvals.path.write_text("{")
    content = ready.round(plan)
    assert RoundReply.from_record(content).status == "failed"
    assert str(ready.path) not in str(content)
    (ready.path / "site.json").write_text("{")
    for kind in ("query.offer", "train.base", "train.round", "evaluate.state", "query.statistics"):
        assert not ready.ask(RecordDict({}), kind)  # no error with a text, and no record


def test_only_what_was_agreed_to_in_this_run_is_trained(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    for change, words in (
        ({"run": "1" * 32}, "never offered to this site in this run"),
        ({"base_digest": "c" * 64}, "the plan belongs to base"),
    ):
        reply = RoundReply.from_record(ready.round(plan, **change))
        assert (reply.status, words in reply.reason) == ("refused", True)


def test_kept_outputs_of_frozen_layers_change_nothing(make_site: MakeSite, trained: Any) -> None:
    model = RunningModel(read_model(trained.path), trained.approvals)
    plan = make_plan(model, RunSettings(rank=2, layers="decoder"))
    states = []
    for kept in (False, True):
        site = make_site(prefix_cache=kept)
        site.approvals.add(read_model(trained.path), "test")
        site.offer(plan)
        site.send_base(trained.path.read_bytes(), plan.base_digest)
        states.append(take_state(site.round(plan, epochs=2), plan))
        assert len(list(site.path.glob("cache/features/*"))) == kept
    start = initial_state(plan, 0)
    assert max(np.abs(states[0][key] - start[key]).max() for key in start) > 0.01
    for key in start:
        np.testing.assert_allclose(states[1][key], states[0][key], atol=2e-5)
