"""What a site says about its validation persons are sums against the base, and no name."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.paired_changes import Changes, told  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.state import State  # noqa: E402
from dafne_federated.core.wire import RoundReply  # noqa: E402
from tests.client.conftest import SiteUnderTest  # noqa: E402
from tests.client.test_app import started  # noqa: E402


def asked(
    site: SiteUnderTest, plan: AdaptationPlan, state: State | None = None
) -> tuple[RoundReply, Changes]:
    reply = RoundReply.from_record(site.round(plan, epochs=0, state=state))
    assert reply.status == "ok", reply.reason
    sums = (reply.change_persons, reply.change_total, reply.change_squares)
    ((choose, accept),) = told(plan.labels, *sums)
    assert choose == {}  # a single validation person accepts
    return reply, accept


def kept(site: SiteUnderTest) -> list[Path]:
    return list((site.path / "cache" / "base-dice").glob("*.json"))


def test_the_base_does_not_differ_from_itself_and_is_not_measured_twice(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    reply, accept = asked(ready, plan)
    assert accept.keys() == set(plan.labels)
    assert all((own.persons, own.total, own.squares) == (1, 0, 0) for own in accept.values())
    assert "clinic-2" not in str(reply)
    assert kept(ready) == []


def test_the_difference_is_that_of_the_dice_whenever_a_site_joins(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    state = {key: value * 20 for key, value in started(plan).items()}
    after, accept = asked(ready, plan, state)  # the first that this site ever measures
    (path,) = kept(ready)
    before, _ = asked(ready, plan)
    for label, new, old in zip(plan.labels, after.dice, before.dice, strict=True):
        assert accept[label].mean == pytest.approx(new - old, abs=1e-12)
        assert accept[label].squares == pytest.approx((new - old) ** 2, abs=1e-12)
    assert any(own.total for own in accept.values())
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    changed = [row | {"dice": 0.25} for row in rows]
    path.write_text(json.dumps(changed))  # it is used again
    _, again = asked(ready, plan, state)
    for label, new in zip(plan.labels, after.dice, strict=True):
        assert again[label].mean == pytest.approx(new - 0.25, abs=1e-12)
    path.write_text("damaged")
    assert asked(ready, plan, state)[1] == accept
