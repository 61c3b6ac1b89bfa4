"""A site gives numbers about all its slices together where it agrees, and keeps what it got."""

from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.core.new_run import make_plan  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.core.state import initial_state  # noqa: E402
from dafne_federated.core.wire import RoundReply, StatisticsReply  # noqa: E402
from dafne_federated.core.wire_arrays import rounded, take_arrays, take_state  # noqa: E402
from tests.client.conftest import MakeSite, SiteUnderTest  # noqa: E402


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


@pytest.mark.parametrize("moving", ["both", "a", "b"])
@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_statistics_come_back_as_they_were_sent_whatever_moves(
    sharing: SiteUnderTest, pooling_plan: AdaptationPlan, moving: str, wire: Any
) -> None:
    plan = pooling_plan
    generator = np.random.default_rng(0)
    state = rounded(
        plan,
        {
            key: generator.uniform(0, 0.02, array.shape).astype("f4") if not array.any() else array
            for key, array in initial_state(plan, 0).items()
        },
        wire,
    )
    content = sharing.round(plan, state=state, trained=moving, sent=moving, wire=wire)
    absent = [part for part in "ab" if moving not in ("both", part)]
    after = take_state(content, plan, wire, absent=absent)
    for key in plan.state_shapes(trained=False):
        assert after[key].tobytes() == state[key].tobytes()
    moved = {
        key[-1] for key in after if key[-2:] in ("/a", "/b") and (after[key] != state[key]).any()
    }
    assert moved == set("ab") - set(absent)
