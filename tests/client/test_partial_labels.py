"""A site trains what it annotated, under the names of the model, and says what it lacks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from flwr.app import RecordDict  # noqa: E402

from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.wire import RoundReply  # noqa: E402
from dafne_federated.core.wire_arrays import take_state  # noqa: E402
from tests.client.conftest import SiteUnderTest  # noqa: E402

At = Callable[..., SiteUnderTest]


@pytest.fixture
def at(tmp_path: Path, squares_folder: Path, trained: Any, plan: AdaptationPlan) -> At:
    """A function that makes a site whose folder names its two labels so."""

    def make(name: str, labels: dict[str, str], ready: bool = True, **changes: Any) -> Any:
        data, home = tmp_path / name / "data", tmp_path / name / "home"
        data.mkdir(parents=True)
        home.mkdir()
        for part in ("images", "labels", "participants.csv"):
            (data / part).symlink_to(squares_folder / part)
        (data / "dataset.json").write_text(json.dumps({"labels": labels}))
        site = SiteUnderTest(home, data, **changes)
        site.approvals.add(read_model(trained.path), "test")
        if ready:
            assert site.offer(plan).status == "need"
            site.send_base(trained.path.read_bytes(), plan.base_digest)
        return site

    return make


def told(content: RecordDict) -> RoundReply:
    reply = RoundReply.from_record(content)
    assert reply.status == "ok", reply.reason
    return reply


def test_other_names_give_the_very_same_bits(at: At, plan: AdaptationPlan) -> None:
    usual = at("usual", {"1": "bright", "2": "dark"}).round(plan)
    names = {"bright": "hell", "dark": "bright"}
    other = at("other", {"1": "hell", "2": "bright"}, label_names=names).round(plan)
    assert told(other).missing is None
    assert told(usual).dice == told(other).dice
    states = [take_state(content, plan, "float32") for content in (usual, other)]
    for key, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][key])


def test_what_was_not_annotated_is_told_and_not_measured(at: At, plan: AdaptationPlan) -> None:
    by_table = at("table", {"1": "bright", "2": "bone"}).round(plan)
    by_setting = at("setting", {"1": "bright", "2": "dark"}, annotated=["bright"]).round(plan)
    states = [take_state(content, plan, "float32") for content in (by_table, by_setting)]
    for content in (by_table, by_setting):
        reply = told(content)
        assert reply.missing == [2]
        assert (reply.dice_cases[0] > 0, reply.dice_cases[1]) == (True, 0)
    for key, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][key])


def test_a_site_that_hides_persons_says_what_it_lacks_only_where_its_people_did(
    at: At, plan: AdaptationPlan
) -> None:
    """What follows from masks may follow from one person's."""
    table = {"1": "bright", "2": "bone"}
    by_table = at("table", table, min_noise=1.0).round(plan, epochs=0)
    by_setting = at("setting", table, min_noise=1.0, annotated=["bright"]).round(plan, epochs=0)
    assert told(by_table).missing is None
    assert told(by_setting).missing == [2]
    assert told(at("open", table).round(plan, epochs=0)).missing == [2]


def test_labels_that_do_not_fit_decline_with_one_clear_reason(at: At, plan: AdaptationPlan) -> None:
    table = {"1": "bright", "2": "dark"}
    site = at("unknown", table, ready=False, label_names={"brigth": "bright"})
    reply = site.offer(plan)
    assert reply.status == "refused"
    assert reply.reason == (
        "label_names: expected labels of the model, ['bright', 'dark'], got 'brigth'"
    )
    site = at("none", {"1": "bone", "2": "fat"}, ready=False)
    assert "say so in label_names" in site.offer(plan).reason
    site = at("gone", table, ready=False, label_names={"bright": "hell"})
    assert site.offer(plan).status == "failed"  # names of the site's own stay there
