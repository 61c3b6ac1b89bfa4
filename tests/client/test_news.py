"""A site says how many cases are new since it trained, once its own people find them enough."""

from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.client.site_cache import SiteCache  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.news import NewsReply, NewsRequest  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.wire import RoundReply  # noqa: E402
from tests.client.conftest import RUN, MakeSite, SiteUnderTest  # noqa: E402


def news(site: SiteUnderTest, plan: AdaptationPlan, since: str | None) -> NewsReply:
    request = NewsRequest(base_digest=plan.base_digest, since=since)
    return NewsReply.from_record(site.ask(request.to_record(), "query.news"))


def test_what_it_trained_on_is_not_new_and_the_names_stay(
    ready: SiteUnderTest, plan: AdaptationPlan
) -> None:
    assert [news(ready, plan, since).new_cases for since in (None, RUN)] == [2, 2]
    assert RoundReply.from_record(ready.round(plan, epochs=0)).status == "ok"
    assert news(ready, plan, RUN).new_cases == 2  # it only measured
    assert RoundReply.from_record(ready.round(plan)).status == "ok"
    assert [news(ready, plan, since).new_cases for since in (None, RUN, "1" * 32)] == [2, 0, 2]
    request = NewsRequest(base_digest=plan.base_digest, since=RUN).to_record()
    assert "clinic-0" not in str(ready.ask(request, "query.news"))
    (kept,) = ready.path.glob("cache/trained/*.json")
    assert kept.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("least", "announced"), [(1, 1), (2, 0)])
def test_too_few_new_cases_are_not_announced(
    make_site: MakeSite, plan: AdaptationPlan, trained: Any, least: int, announced: int
) -> None:
    site = make_site(least_new_cases=least)
    site.approvals.add(read_model(trained.path), "test")
    SiteCache(site.path / "cache").keep_trained(RUN, "clinic", ["clinic-0"])
    assert news(site, plan, RUN).new_cases == announced


def test_a_base_that_nobody_approved_gets_no_news(
    make_site: MakeSite, plan: AdaptationPlan
) -> None:
    reply = news(make_site(), plan, None)
    assert (reply.status, reply.new_cases) == ("refused", 0)
    assert "is not approved at this site" in reply.reason
