"""A site hides its persons as it promises, and refuses what the noise would not cover."""

import csv
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]
pytest.importorskip("dp_accounting")

from flwr.app import RecordDict  # noqa: E402

from dafne_federated.client.privacy_ledger import PrivacyLedger, Release  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.state import State  # noqa: E402
from dafne_federated.core.wire import RoundReply, StatisticsReply  # noqa: E402
from dafne_federated.core.wire_arrays import take_state  # noqa: E402
from tests.client.conftest import MakeSite, SiteUnderTest  # noqa: E402

ASKED = {"noise": 4.0, "clip": 0.1, "person_rate": 0.5}


def answered(site: SiteUnderTest, plan: AdaptationPlan, **changes: Any) -> tuple[RoundReply, State]:
    content = site.round(plan, **(ASKED | changes))
    reply = RoundReply.from_record(content)
    assert reply.status == "ok", reply.reason
    return reply, take_state(content, plan, "float32")


def refused(content: RecordDict) -> str:
    reply = RoundReply.from_record(content)
    assert reply.status == "refused"
    assert "arrays" not in content
    return reply.reason


def releases(site: SiteUnderTest) -> tuple[Release, ...]:
    return PrivacyLedger(site.path / "cache" / "privacy").releases()


def site_with(make_site: MakeSite, plan: AdaptationPlan, trained: Any, **changes: Any) -> Any:
    site = make_site(**changes)
    site.approvals.add(read_model(trained.path), "test")
    site.offer(plan)
    assert site.send_base(trained.path.read_bytes(), plan.base_digest).status == "stored"
    return site


def test_the_answer_says_what_was_spent_and_neither_loss_nor_slices(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    content = ready.round(plan, **ASKED)
    reply = RoundReply.from_record(content)
    assert (reply.unit, reply.delta, reply.steps) == ("person", 1e-5, 2)
    assert reply.epsilon is not None
    assert 0 < reply.epsilon < 2
    assert (reply.loss, reply.training_slices, reply.training_cases) == (None, None, 2)
    assert not {"loss", "training-slices"} & set(content.metric_records["metrics"])
    assert len(reply.dice) == len(plan.labels)


def test_a_retry_gives_the_same_bits_and_costs_nothing(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    first, state = answered(ready, plan)
    for kept in list((ready.path / "cache" / "privacy").glob("answer-*.npz")):
        kept.unlink()  # as after a kill between the ledger and the answer
    again, same = answered(ready, plan)
    third, kept_state = answered(ready, plan)  # from the answer that was kept
    assert first.epsilon == again.epsilon == third.epsilon
    assert len(releases(ready)) == 1
    for key, array in state.items():
        np.testing.assert_array_equal(same[key], array)
        np.testing.assert_array_equal(kept_state[key], array)


@pytest.mark.parametrize(
    "changes",
    [{"noise": 5.0}, {"clip": 0.2}, {"round": 2}, {"learning_rate": 0.02}, {"batch_size": 2}],
)
def test_another_question_has_other_noise_and_is_counted(
    ready: SiteUnderTest, plan: AdaptationPlan, changes: dict[str, Any]
) -> None:
    first, state = answered(ready, plan)
    second, other = answered(ready, plan, **changes)
    assert len(releases(ready)) == 2
    assert first.epsilon is not None
    assert second.epsilon is not None
    assert second.epsilon > first.epsilon
    assert any(not np.array_equal(other[key], array) for key, array in state.items())


def test_a_site_that_lost_its_ledger_gives_no_noise_until_its_people_say_so(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any, tmp_path: Path
) -> None:
    marker = tmp_path / "marker.json"
    site = site_with(make_site, plan, trained, privacy_marker=str(marker))
    answered(site, plan)
    shutil.rmtree(site.path / "cache" / "privacy")
    words = "gave 1 answers with noise, and the ledger of what they spent .* knows 0"
    assert re.search(words, refused(site.round(plan, **ASKED)))
    assert RoundReply.from_record(site.round(plan)).status == "ok"  # without noise it goes on
    marker.unlink()
    answered(site, plan)


def test_another_key_makes_other_noise(ready: SiteUnderTest, plan: AdaptationPlan) -> None:
    _, state = answered(ready, plan)
    (ready.path / "cache" / "privacy" / "key").unlink()
    _, other = answered(ready, plan)
    assert any(not np.array_equal(other[key], array) for key, array in state.items())


def test_other_data_under_the_same_question_have_other_noise(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any
) -> None:
    """Else the difference of two answers would be that of one person, without noise."""
    site = site_with(make_site, plan, trained, training=["clinic-0", "clinic-1", "clinic-3"])
    answered(site, plan)
    site = site_with(make_site, plan, trained, training=["clinic-0", "clinic-1"])
    answered(site, plan)
    assert len({old.name for old in releases(site)}) == 2


def test_another_run_that_asks_the_same_is_told_all_that_it_received(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    rounds = [answered(ready, plan, round=number)[0].epsilon for number in (1, 2)]
    ready.offer(plan, {"run": "b" * 32})
    again = [answered(ready, plan, round=n, run="b" * 32)[0].epsilon for n in (1, 2)]
    assert again == rounds
    assert len(releases(ready)) == 2


def test_labels_that_a_site_lacks_are_part_of_the_question(
    plan: AdaptationPlan, trained: Any, squares_folder: Path, tmp_path: Path
) -> None:
    """They change the loss even where no mask shows them."""
    data = tmp_path / "data"
    shutil.copytree(squares_folder, data)
    for name in ("clinic-0", "clinic-1"):
        path = data / "labels" / f"{name}.nii.gz"
        image = nib.load(path)
        mask = np.asanyarray(image.dataobj)
        nib.save(nib.Nifti1Image(np.where(mask == 2, 0, mask), image.affine), path)
    states = []
    for annotated in (["bright", "dark"], ["bright"]):
        make = partial(SiteUnderTest, tmp_path, data)
        site = site_with(make, plan, trained, annotated=annotated)
        states.append(answered(site, plan)[1])
    assert len(releases(site)) == 2
    assert any(not np.array_equal(states[0][key], array) for key, array in states[1].items())


def test_a_site_can_demand_noise(make_site: MakeSite, plan: AdaptationPlan, trained: Any) -> None:
    site = site_with(make_site, plan, trained, min_noise=3.0)
    assert "take privacy 'person'" in refused(site.round(plan))
    assert "at least 3, the run asks for 1" in refused(site.round(plan, **(ASKED | {"noise": 1.0})))
    assert not (site.path / "cache" / "privacy").exists()
    reply = StatisticsReply.from_record(site.statistics(plan, "classes"))
    assert (reply.status, reply.class_pixels) == ("withheld", [])
    answered(site, plan)


def test_a_site_stops_at_its_bound(make_site: MakeSite, plan: AdaptationPlan, trained: Any) -> None:
    site = site_with(make_site, plan, trained, max_epsilon=1.5)
    spent, _ = answered(site, plan)
    reason = refused(site.round(plan, round=2, **(ASKED | {"noise": 0.5})))
    assert "it allows 1.5" in reason
    assert len(releases(site)) == 1
    assert answered(site, plan)[0].epsilon == spent.epsilon


def test_what_was_pooled_is_not_covered(ready: SiteUnderTest, plan: AdaptationPlan) -> None:
    channels = len(plan.labels) + 1
    counts = {"class_pixels": [10] * channels, "class_slices": [1] * channels}
    assert "take statistics 'base'" in refused(ready.round(plan, **ASKED, **counts))
    assert not (ready.path / "cache" / "privacy").exists()


def test_delta_must_mean_something(make_site: MakeSite, plan: AdaptationPlan, trained: Any) -> None:
    site = site_with(make_site, plan, trained, delta=0.5)
    assert "below 1 / persons" in refused(site.round(plan, **ASKED))


def test_a_person_of_both_parts_is_refused(
    plan: AdaptationPlan, trained: Any, squares_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(squares_folder, data)
    path = data / "participants.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            same = row["subject"] in ("clinic-0", "clinic-2")
            writer.writerow(row | {"person": "the same" if same else row["person"]})
    site = site_with(partial(SiteUnderTest, tmp_path, data), plan, trained)
    assert "the Dice of validation cases leaves" in refused(site.round(plan, **ASKED))
