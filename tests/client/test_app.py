"""A site does only what its people agreed to, and nothing of it leaks when something fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from flwr.app import Context, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from dafne_federated.client.app import app  # noqa: E402
from dafne_federated.core.adapters import AdaptedNetwork  # noqa: E402
from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.core.new_run import make_plan  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.core.state import State, initial_state, state_bytes, state_rank  # noqa: E402
from dafne_federated.core.strategy_table import RoundRule  # noqa: E402
from dafne_federated.core.versions import software_version  # noqa: E402
from dafne_federated.core.wire import (  # noqa: E402
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
    StatisticsReply,
    StatisticsRequest,
    array_record,
)
from dafne_federated.core.wire_arrays import state_record, take_arrays, take_state  # noqa: E402

RUN = "0" * 32


@pytest.fixture(scope="module")
def plan(trained: Any) -> AdaptationPlan:
    model = RunningModel(read_model(trained.path), trained.approvals)
    return make_plan(model, RunSettings(rank=2))


class SiteUnderTest:
    """A site with its folder, spoken to as Flower would."""

    def __init__(self, path: Path, data: Path, **changes: Any) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.path = path
        self.approvals = Approvals(path / "approved.json")
        settings = {
            "name": "clinic",
            "data": str(data),
            "training": ["clinic-0", "clinic-1"],
            "validation": ["clinic-2"],
            "cache": str(path / "cache"),
            "approvals": str(self.approvals.path),
            "threads": 2,
            "device": "cpu",
        } | changes
        (path / "site.json").write_text(json.dumps(settings))

    def ask(self, content: RecordDict, kind: str) -> RecordDict:
        message = Message(content, dst_node_id=5, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        config = {"site": str(self.path / "site.json")}
        context = Context(1, 5, config, RecordDict({}), {})
        reply = app(message, context)
        assert not reply.has_error()
        return reply.content

    def offer(self, plan: AdaptationPlan, changes: dict[str, Any] | None = None) -> OfferReply:
        offer = Offer(
            software=software_version(),
            run=RUN,
            base_digest=plan.base_digest,
            base_bytes=100,
            plan=plan.to_json(),
        ).model_copy(update=changes or {})
        return OfferReply.from_record(self.ask(offer.to_record(), "query.offer"))

    def send_base(self, data: bytes, digest: str) -> BaseReply:
        arrays = array_record({"base": np.frombuffer(data, np.uint8)})
        content = BaseModelBytes(run=RUN, base_digest=digest).to_record(arrays)
        return BaseReply.from_record(self.ask(content, "train.base"))

    def round(
        self,
        plan: AdaptationPlan,
        epochs: int = 1,
        state: State | None = None,
        sent_as: Any = None,
        **changes: Any,
    ) -> RecordDict:
        request = RoundRequest(
            run=RUN,
            round=1,
            base_digest=plan.base_digest,
            plan_digest=plan.digest,
            epochs=epochs,
            batch_size=4,
            learning_rate=0.01,
            seed=1,
        ).model_copy(update=changes)
        kind = "train.round" if epochs else "evaluate.state"
        arrays = state_record(state or initial_state(plan, 0), sent_as or request.wire)
        return self.ask(request.to_record(arrays), kind)

    def statistics(self, plan: AdaptationPlan, what: str, number: int = 0, **more: Any) -> Any:
        """Return the content of the answer; ``more`` holds arrays by name, or a run."""
        request = StatisticsRequest.model_validate(
            {
                "run": more.pop("run", RUN),
                "base_digest": plan.base_digest,
                "plan_digest": plan.digest,
                "what": what,
                "number": number,
            }
        )
        return self.ask(request.to_record(array_record(more)), "query.statistics")


def started(plan: AdaptationPlan) -> State:
    """Return a state in which both factors have a gradient."""
    generator = np.random.default_rng(0)
    state = initial_state(plan, 0)
    return {
        key: generator.normal(0, 0.02, value.shape).astype("f4") if key.endswith("/b") else value
        for key, value in state.items()
    }


MakeSite = Callable[..., SiteUnderTest]


@pytest.fixture
def make_site(tmp_path: Path, squares_folder: Path) -> MakeSite:
    def make(**changes: Any) -> SiteUnderTest:
        return SiteUnderTest(tmp_path, squares_folder, **changes)

    return make


@pytest.fixture
def ready(make_site: MakeSite, plan: AdaptationPlan, trained: Any) -> SiteUnderTest:
    """A site that approved and has the base."""
    site = make_site()
    site.approvals.add(read_model(trained.path), "test")
    assert site.offer(plan).status == "need"
    assert site.send_base(trained.path.read_bytes(), plan.base_digest).status == "stored"
    assert site.offer(plan).status == "have"
    return site


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
        ({"software": "9.9"}, "the server 9.9"),
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
    import dafne_federated.client.site as module

    first = take_state(ready.round(plan), plan)
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


@pytest.fixture(scope="module")
def pooling_plan(trained: Any) -> AdaptationPlan:
    model = RunningModel(read_model(trained.path), trained.approvals)
    return make_plan(model, RunSettings(rank=2, statistics="pooled"))


@pytest.fixture
def sharing(make_site: MakeSite, pooling_plan: AdaptationPlan, trained: Any) -> SiteUnderTest:
    """A site that approved and has the base, for a plan with statistics."""
    site = make_site()
    site.approvals.add(read_model(trained.path), "test")
    site.offer(pooling_plan)
    site.send_base(trained.path.read_bytes(), pooling_plan.base_digest)
    return site


def test_a_site_counts_its_classes(sharing: SiteUnderTest, pooling_plan: AdaptationPlan) -> None:
    reply = StatisticsReply.from_record(sharing.statistics(pooling_plan, "classes"))
    assert (reply.status, reply.slices) == ("ok", 8)
    assert reply.class_slices == [8, 8, 8]
    assert sum(reply.class_pixels) % 8 == 0
    # rows times columns of the squares that the test draws, before they are resampled
    np.testing.assert_allclose(reply.class_pixels[1:], [8 * 12 * 10, 8 * 10 * 12], rtol=0.1)


def test_moments_follow_the_new_statistics_in_front(
    sharing: SiteUnderTest, pooling_plan: AdaptationPlan
) -> None:
    plan = pooling_plan
    shapes = [mean.shape for mean, _ in plan.normalisations]

    def asked(number: int, renewed: dict[str, Any]) -> dict[str, Any]:
        content = sharing.statistics(plan, "moments", number, **renewed)
        reply = StatisticsReply.from_record(content)
        assert (reply.status, reply.slices, reply.number) == ("ok", 8, number)
        wanted = {"mean": shapes[number], "variance": shapes[number]}
        return take_arrays(content, wanted, "float64")

    first = asked(0, {})
    assert (first["variance"] > 0).all()
    nothing = {key: np.zeros(s, np.float32) for key, s in plan.statistics_shapes(1).items()}
    moved = {key: array + np.float32(0.5) for key, array in nothing.items()}
    before, after = asked(1, nothing), asked(1, moved)
    assert np.abs(before["mean"] - after["mean"]).max() > 1e-3
    again = asked(0, {})
    assert again["mean"].tobytes() == first["mean"].tobytes()


def test_what_a_site_does_not_share_stays_there(
    make_site: MakeSite, pooling_plan: AdaptationPlan, trained: Any
) -> None:
    site = make_site(share_statistics=False)
    site.approvals.add(read_model(trained.path), "test")
    assert site.offer(pooling_plan).status == "need"  # it takes part
    site.send_base(trained.path.read_bytes(), pooling_plan.base_digest)
    for what in ("classes", "moments"):
        content = site.statistics(pooling_plan, what)
        reply = StatisticsReply.from_record(content)
        assert (reply.status, reply.slices, reply.class_pixels) == ("withheld", 0, [])
        assert "arrays" not in content
    assert RoundReply.from_record(site.round(pooling_plan)).status == "ok"


def test_questions_that_do_not_fit_are_refused_in_words(
    sharing: SiteUnderTest, pooling_plan: AdaptationPlan
) -> None:
    number = len(pooling_plan.normalisations)
    everything = {
        key: np.zeros(shape, np.float32)
        for key, shape in pooling_plan.statistics_shapes(number).items()
    }
    for content, words in (
        (sharing.statistics(pooling_plan, "classes", run="1" * 32), "never offered"),
        (sharing.statistics(pooling_plan, "moments", 1), "arrays differ from the plan"),
        (sharing.statistics(pooling_plan, "moments", number, **everything), "the plan sets"),
    ):
        reply = StatisticsReply.from_record(content)
        assert (reply.status, words in reply.reason) == ("refused", True)


def test_pooled_counts_change_what_is_learnt_and_wrong_ones_are_refused(
    sharing: SiteUnderTest, pooling_plan: AdaptationPlan
) -> None:
    plan = pooling_plan
    counts = StatisticsReply.from_record(sharing.statistics(plan, "classes"))
    pixels, slices = counts.class_pixels, counts.class_slices
    rarer = [pixels[0] + pixels[1] // 2, pixels[1] - pixels[1] // 2, pixels[2]]
    states = []
    for given in (None, pixels, rarer):
        changes = {"class_pixels": given, "class_slices": slices} if given else {}
        content = sharing.round(plan, **changes)
        states.append(take_state(content, plan))
        assert not any(states[-1][key].any() for key in plan.state_shapes(trained=False))
    assert max(np.abs(states[2][key] - states[1][key]).max() for key in states[0]) > 1e-4
    content = sharing.round(plan, class_pixels=pixels[:2], class_slices=slices[:2])
    reply = RoundReply.from_record(content)
    assert (reply.status, "pooled counts are not of 3 channels" in reply.reason) == (
        "refused",
        True,
    )
