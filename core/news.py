"""The cheap question of a federation that goes on: how many new cases does a site have?"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dafne_federated.core.plan import Sha256
from dafne_federated.core.wire import Reason, SiteName, WireMessage

QUERY_NEWS = "query.news"


class NewsRequest(WireMessage):
    """Ask how many training cases a site has that it did not train on in an earlier run.

    Attributes:
        base_digest: SHA-256 of the base that it would train.
        since: The last run in which the server used an update of it; none if there is none.
    """

    protocol: Literal[1] = 1
    base_digest: Sha256
    since: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None


class NewsReply(WireMessage):
    """How many, or 0 while they are fewer than the site's own people find worth a training."""

    metrics: ClassVar[frozenset[str]] = frozenset({"new-cases"})

    protocol: Literal[1] = 1
    site: SiteName
    base_digest: Sha256
    status: Literal["ok", "refused", "failed"]
    reason: Reason = ""
    new_cases: int = Field(default=0, ge=0, le=1_000_000)
