"""The Flower ClientApp of a site: read the message, let the site act, answer.

What goes wrong becomes words of ours, see ``answering.py``. What asks only for consent is answered
without loading TensorFlow, which comes with ``site.py``.
"""

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dafne_federated.client.answering import answer, working_site
from dafne_federated.client.consent import Consent
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.errors import ApprovalError, MessageError
from dafne_federated.core.files import sha256
from dafne_federated.core.handshake import (
    difference,
    own_versions,
    versions_said,
    with_protocol,
)
from dafne_federated.core.local_part import global_part, silenced
from dafne_federated.core.news import NewsReply, NewsRequest
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.privacy_accountant import UNIT
from dafne_federated.core.state import without_factors
from dafne_federated.core.wire import (
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
    StatisticsReply,
    StatisticsRequest,
)
from dafne_federated.core.wire_arrays import state_record, take_arrays, take_bytes, take_state

if TYPE_CHECKING:
    from dafne_federated.client.site import Site
    from dafne_federated.core.metrics import Agreement

log = logging.getLogger(__name__)

LARGEST_BASE = 4 * 2**30  # bytes

app = ClientApp()


@app.query("alive")
def say_nothing(message: Message, _context: Context) -> Message:
    """Answer, which says that all that was asked before is done with."""
    return Message(RecordDict({}), reply_to=message)


@app.query("offer")
def consider_offer(message: Message, context: Context) -> Message:
    """Say whether this site takes part and whether it has the base."""

    def shake_hands() -> None:
        said = versions_said(message.content)
        if said and (words := difference(with_protocol(own_versions()), said)):
            raise ApprovalError(words)
        Offer.from_record(message.content)

    def act(site: Consent) -> RecordDict:
        offer = Offer.from_record(message.content)
        plan = AdaptationPlan.from_json(offer.plan)
        if plan.base_digest != offer.base_digest:
            msg = "the plan belongs to another base than the one offered"
            raise MessageError(msg)
        if site.wants_to_see(plan.base_digest):
            return _offer_reply(site.settings, "need")
        site.consider(offer.run, plan)
        settings = site.settings
        return _offer_reply(
            settings,
            "have" if site.cache.has_base(plan.base_digest) else "need",
            training_cases=len(settings.training),
            validation_cases=len(settings.validation),
            rank=settings.rank,
        )

    return answer(message, context, act, _offer_reply, Consent, shake_hands)


@app.train("base")
def store_base(message: Message, context: Context) -> Message:
    """Check and keep the bytes of the base; nothing of it is executed here."""

    def act(site: Consent) -> RecordDict:
        request = BaseModelBytes.from_record(message.content)
        unseen = site.inbox if site.wants_to_see(request.base_digest) else None
        if unseen is None:
            site.require_consent(request.base_digest)
        data = take_bytes(message.content, "base", LARGEST_BASE)
        if (digest := sha256(data)) != request.base_digest:
            msg = f"base model: expected digest {request.base_digest[:16]}, got {digest[:16]}"
            raise MessageError(msg)
        if unseen is not None:  # people look at it; nobody agreed to it yet
            unseen.keep(data)
            site.require_consent(digest)
        site.cache.keep_base(data)
        return _base_reply(site.settings, "stored")

    return answer(message, context, act, _base_reply, Consent)


@app.query("statistics")
def share_statistics(message: Message, context: Context) -> Message:
    """Give numbers about all training slices together, if this site shares such."""

    def respond(
        settings: SiteSettings, status: str, reason: str = "", **fields: object
    ) -> StatisticsReply:
        request = StatisticsRequest.from_record(message.content)
        return StatisticsReply.model_validate(
            {
                **request.model_dump(exclude={"protocol"}),
                "site": settings.name,
                "status": status,
                "reason": reason,
                **fields,
            }
        )

    def act(site: "Site") -> RecordDict:
        request = StatisticsRequest.from_record(message.content)
        plan = site.agreed_plan(request.run, request.plan_digest, request.base_digest)
        settings = site.settings
        if not settings.share_statistics:
            return respond(settings, "withheld", "this site does not share statistics").to_record()
        if settings.min_noise:
            reason = "this site hides each person, and statistics of all of them have no noise"
            return respond(settings, "withheld", reason).to_record()
        if request.what == "classes":
            counts, slices = site.class_counts(plan)
            pixels, holding = list(counts.pixels), list(counts.slices)
            return respond(
                settings, "ok", slices=slices, class_pixels=pixels, class_slices=holding
            ).to_record()
        renewed = plan.statistics_shapes(request.number)
        found = site.moments(plan, request.number, take_arrays(message.content, renewed))
        arrays = {"mean": found.mean, "variance": found.variance}
        return respond(settings, "ok", slices=found.count).to_record(arrays)

    return answer(message, context, act, lambda *given: respond(*given).to_record(), working_site)


@app.query("news")
def tell_news(message: Message, context: Context) -> Message:
    """Say how many training cases are new since a run; nothing is read but settings."""

    def respond(
        settings: SiteSettings, status: str, reason: str = "", new_cases: int = 0
    ) -> RecordDict:
        fields = {
            "site": settings.name,
            "base_digest": NewsRequest.from_record(message.content).base_digest,
            "status": status,
            "reason": reason,
            "new_cases": new_cases,
        }
        return NewsReply.model_validate(fields).to_record()

    def act(site: Consent) -> RecordDict:
        request = NewsRequest.from_record(message.content)
        site.require_consent(request.base_digest)
        return respond(site.settings, "ok", new_cases=site.new_cases(request.since))

    return answer(message, context, act, respond, Consent)


@app.train("round")
def train_round(message: Message, context: Context) -> Message:
    """Evaluate the state that came, train from it, and send the new one."""
    return _round(message, context, train=True)


@app.evaluate("state")
def evaluate_state(message: Message, context: Context) -> Message:
    """Evaluate the state that came."""
    return _round(message, context, train=False)


def _round(message: Message, context: Context, train: bool) -> Message:
    def respond(settings: SiteSettings, status: str, reason: str = "") -> RecordDict:
        request = RoundRequest.from_record(message.content)
        return _round_reply(request, settings, status, reason, {}).to_record()

    def act(site: "Site") -> RecordDict:
        from dafne_federated.client.gate_evidence import compared_with_start, first_state
        from dafne_federated.client.limits import require_epochs
        from dafne_federated.client.private_round import require_noise, train_privately
        from dafne_federated.client.site import dice_by_label

        request = RoundRequest.from_record(message.content)
        plan = site.agreed_plan(request.run, request.plan_digest, request.base_digest)
        require_epochs(site.settings, request.epochs)
        state, rule = take_state(message.content, plan, request.wire), request.rule
        state = site.start(request, plan, state)
        begun = time.monotonic()
        common = silenced(state, request.local_rank)
        rows: list[Agreement] = []
        change: dict[str, object] = {}
        if site.settings.share_dice:
            first = first_state(plan, request, message.content)
            rows, change = compared_with_start(site, plan, common, first)
        dice, counts = dice_by_label(plan, rows)
        fields: dict[str, object] = {
            **change,
            "dice": dice,
            "dice_cases": counts,
            "evaluation_seconds": time.monotonic() - begun,
            "device": site.device().name,
            "missing": list(_told_missing(site, plan)) or None,
        }
        if not train:
            return _round_reply(request, site.settings, "ok", "", fields).to_record()
        fields["training_cases"] = len(site.settings.training)
        require_noise(site.settings, request.mechanism)
        if request.mechanism:
            private = train_privately(site, plan, state, request, request.mechanism)
            state = private.state
            fields |= {
                "unit": UNIT,
                "epsilon": private.epsilon,
                "delta": private.delta,
                "steps": private.steps,
                "seconds": private.seconds,
            }
        else:
            state, result, slices = site.train(
                plan,
                state,
                request.epochs,
                request.batch_size,
                request.learning_rate,
                request.seed,
                request.round,
                trained=rule.trained,
                classes=request.classes,
                proximal=request.proximal,
                optimiser=site.optimiser_files(request, plan),
            )
            fields |= {
                "training_slices": slices,
                "loss": result.loss if site.settings.share_loss else None,
                "seconds": result.seconds,
            }
        name = site.settings.name
        site.cache.keep_trained(request.run, name, site.settings.training)
        if rule.personal or request.local_rank:
            site.cache.keep_personal(request.run, name, plan, request.round, state)
        sent = without_factors(global_part(state, request.local_rank), rule.absent)
        arrays = state_record(plan, sent, request.wire)
        return _round_reply(request, site.settings, "ok", "", fields).to_record(arrays)

    return answer(message, context, act, respond, working_site)


def _told_missing(site: "Site", plan: AdaptationPlan) -> tuple[int, ...]:
    """Return the channels of missing labels; none where they may follow from a hidden person."""
    if site.settings.min_noise and site.settings.annotated is None:
        return ()
    return site.data.labels(plan.labels).missing


def _offer_reply(
    settings: SiteSettings,
    status: str,
    reason: str = "",
    training_cases: int = 0,
    validation_cases: int = 0,
    rank: int | None = None,
) -> RecordDict:
    return OfferReply.model_validate(
        {
            **own_versions(),
            "site": settings.name,
            "status": status,
            "reason": reason,
            "training_cases": training_cases,
            "validation_cases": validation_cases,
            "rank": rank,
        }
    ).to_record()


def _base_reply(settings: SiteSettings, status: str, reason: str = "") -> RecordDict:
    fields = {"site": settings.name, "status": status, "reason": reason}
    return BaseReply.model_validate(fields).to_record()


def _round_reply(
    request: RoundRequest,
    settings: SiteSettings,
    status: str,
    reason: str,
    fields: Mapping[str, object],
) -> RoundReply:
    return RoundReply.model_validate(
        {
            "run": request.run,
            "round": request.round,
            "site": settings.name,
            "base_digest": request.base_digest,
            "plan_digest": request.plan_digest,
            "status": status,
            "reason": reason,
            **fields,
        }
    )
