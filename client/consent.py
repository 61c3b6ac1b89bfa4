"""What a site agrees to: bases, plans, limits. It reads settings and small files, no images.

TensorFlow takes seconds to load, and each message starts a process; a message that asks only for
consent is answered without it. ``site.py`` adds the work.
"""

from dafne_federated.client.inbox import Inbox
from dafne_federated.client.labels_here import labels_here
from dafne_federated.client.limits import require_cases, require_method
from dafne_federated.client.site_cache import SiteCache
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import ApprovalError, MessageError, SettingsError
from dafne_federated.core.plan import AdaptationPlan


class Consent:
    """What the people of one site agreed to.

    Args:
        settings: The site.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self.cache = SiteCache(settings.cache)
        self.approvals = Approvals(settings.approvals)
        self.inbox = Inbox(settings.inbox) if settings.inbox else None

    def consider(self, run: str, plan: AdaptationPlan) -> None:
        """Decide whether this site takes part in a run, and remember its plan.

        Raises:
            ApprovalError: The base is not approved here, there are too few cases, the site does
                not train by the plan's method, the plan does not allow the site's rank, or its
                labels and those of the model do not fit.
        """
        self.require_consent(plan.base_digest)
        require_method(self.settings, plan)
        try:
            labels_here(self.settings, plan.labels)
        except SettingsError as error:
            raise ApprovalError(str(error)) from None
        pairs = any(target.low_rank for target in plan.targets)
        if pairs and (self.settings.rank or 0) > plan.max_rank:
            msg = f"this site trains at rank {self.settings.rank}, the plan allows {plan.max_rank}"
            raise ApprovalError(msg)
        self.cache.keep_plan(run, plan)

    def wants_to_see(self, base_digest: str) -> bool:
        """Return whether a base that nobody approved shall come to be looked at, as bytes."""
        if self.inbox is None or self.approvals.allows(base_digest):
            return False
        return not self.inbox.has(base_digest)

    def require_consent(self, base_digest: str) -> None:
        """Refuse what this site's people did not agree to; asked again with every message.

        Raises:
            ApprovalError: The base is not approved here, or there are too few cases.
        """
        if not self.approvals.allows(base_digest):
            waits = self.inbox is not None and self.inbox.has(base_digest)
            words = "waits for approval" if waits else "is not approved"
            msg = f"base model {base_digest[:16]} {words} at this site"
            raise ApprovalError(msg)
        require_cases(self.settings)

    def new_cases(self, since: str | None) -> int:
        """Return how many training cases are new since run ``since``, 0 if not yet enough."""
        before = self.cache.trained(since, self.settings.name) if since else frozenset()
        new = len(set(self.settings.training) - before)
        return new if new >= self.settings.least_new_cases else 0

    def agreed_plan(self, run: str, digest: str, base_digest: str) -> AdaptationPlan:
        """Return the plan that this site agreed to for a run.

        Raises:
            MessageError: It never did, or the message names another base than the plan.
            ApprovalError: The site does not agree any more.
        """
        plan = self.cache.plan(run, digest)
        if plan is None:
            msg = (
                f"plan {digest[:16]} was never offered to this site in this run, or before its "
                "software was updated"
            )
            raise MessageError(msg)
        if plan.base_digest != base_digest:
            msg = f"the plan belongs to base {plan.base_digest[:16]}, not to {base_digest[:16]}"
            raise MessageError(msg)
        self.require_consent(base_digest)
        require_method(self.settings, plan)
        return plan
