"""The Flower ClientApp of a site: read the message, let the site act, answer.

Whatever goes wrong at a site, its answer holds a status and plain words of ours: texts of
exceptions, paths and names never leave.
"""

import logging
import time
from collections.abc import Callable, Mapping

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dafne_federated.client.private_round import require_noise, train_privately
from dafne_federated.client.site import Site, dice_by_label
from dafne_federated.client.site_settings import site_of
from dafne_federated.core.errors import ApprovalError, MessageError, StateError
from dafne_federated.core.files import sha256
from dafne_federated.core.local_part import global_part, silenced, with_local
from dafne_federated.core.news import NewsReply, NewsRequest
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.privacy_accountant import UNIT
from dafne_federated.core.state import without_factors
from dafne_federated.core.versions import software_version
from dafne_federated.core.wire import (
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
    StatisticsReply,
    StatisticsRequest,
    plain,
)
from dafne_federated.core.wire_arrays import state_record, take_arrays, take_bytes, take_state

log = logging.getLogger(__name__)

LARGEST_BASE = 4 * 2**30  # bytes
FAILED = "the site could not do this; its own log says why"

app = ClientApp()


@app.query("offer")
def consider_offer(message: Message, context: Context) -> Message:
    """Say whether this site takes part and whether it has the base."""

    def act(site: Site) -> RecordDict:
        offer = Offer.from_record(message.content)
        if offer.software != software_version():
            msg = f"this site runs version {software_version()}, the server {offer.software}"
            raise ApprovalError(msg)
        plan = AdaptationPlan.from_json(offer.plan)
        if plan.base_digest != offer.base_digest:
            msg = "the plan belongs to another base than the one offered"
            raise MessageError(msg)
        if site.wants_to_see(plan.base_digest):
            return _offer_reply(site, "need")
        site.consider(offer.run, plan)
        settings = site.settings
        return _offer_reply(
            site,
            "have" if site.cache.has_base(plan.base_digest) else "need",
            training_cases=len(settings.training),
            validation_cases=len(settings.validation),
            rank=settings.rank,
        )

    return _answer(message, context, act, _offer_reply)


@app.train("base")
def store_base(message: Message, context: Context) -> Message:
    """Check and keep the bytes of the base; nothing of it is executed here."""

    def act(site: Site) -> RecordDict:
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
        return _base_reply(site, "stored")

    return _answer(message, context, act, _base_reply)


@app.query("statistics")
def share_statistics(message: Message, context: Context) -> Message:
    """Give numbers about all training slices together, if this site shares such."""

    def respond(site: Site, status: str, reason: str = "", **fields: object) -> StatisticsReply:
        request = StatisticsRequest.from_record(message.content)
        return StatisticsReply.model_validate(
            {
                **request.model_dump(exclude={"protocol"}),
                "site": site.settings.name,
                "status": status,
                "reason": reason,
                **fields,
            }
        )

    def act(site: Site) -> RecordDict:
        request = StatisticsRequest.from_record(message.content)
        plan = site.agreed_plan(request.run, request.plan_digest, request.base_digest)
        if not site.settings.share_statistics:
            return respond(site, "withheld", "this site does not share statistics").to_record()
        if site.settings.min_noise:
            reason = "this site hides each person, and statistics of all of them have no noise"
            return respond(site, "withheld", reason).to_record()
        if request.what == "classes":
            counts, slices = site.class_counts(plan)
            pixels, holding = list(counts.pixels), list(counts.slices)
            return respond(
                site, "ok", slices=slices, class_pixels=pixels, class_slices=holding
            ).to_record()
        renewed = plan.statistics_shapes(request.number)
        found = site.moments(plan, request.number, take_arrays(message.content, renewed))
        arrays = {"mean": found.mean, "variance": found.variance}
        return respond(site, "ok", slices=found.count).to_record(arrays)

    return _answer(message, context, act, lambda *given: respond(*given).to_record())


@app.query("news")
def tell_news(message: Message, context: Context) -> Message:
    """Say how many training cases are new since a run; nothing is read but settings."""

    def respond(site: Site, status: str, reason: str = "", new_cases: int = 0) -> RecordDict:
        fields = {
            "site": site.settings.name,
            "base_digest": NewsRequest.from_record(message.content).base_digest,
            "status": status,
            "reason": reason,
            "new_cases": new_cases,
        }
        return NewsReply.model_validate(fields).to_record()

    def act(site: Site) -> RecordDict:
        request = NewsRequest.from_record(message.content)
        site.require_consent(request.base_digest)
        return respond(site, "ok", new_cases=site.new_cases(request.since))

    return _answer(message, context, act, respond)


@app.train("round")
def train_round(message: Message, context: Context) -> Message:
    """Evaluate the state that came, train from it, and send the new one."""
    return _round(message, context, train=True)


@app.evaluate("state")
def evaluate_state(message: Message, context: Context) -> Message:
    """Evaluate the state that came."""
    return _round(message, context, train=False)


def _round(message: Message, context: Context, train: bool) -> Message:
    def respond(site: Site, status: str, reason: str = "", **fields: object) -> RecordDict:
        request = RoundRequest.from_record(message.content)
        return _round_reply(request, site, status, reason, fields).to_record()

    def act(site: Site) -> RecordDict:
        request = RoundRequest.from_record(message.content)
        plan = site.agreed_plan(request.run, request.plan_digest, request.base_digest)
        state, rule = take_state(message.content, plan, request.wire), request.rule
        state = site.start(request, plan, state)
        begun = time.monotonic()
        common = silenced(state, request.local_rank)
        dice, counts = dice_by_label(plan, site.evaluate(plan, common))
        fields: dict[str, object] = {
            "dice": dice,
            "dice_cases": counts,
            "evaluation_seconds": time.monotonic() - begun,
            "device": site.device().name,
            "missing": list(_told_missing(site, plan)) or None,
        }
        if request.first:
            fields |= _first_measured(site, plan, request, message.content)
        if not train:
            return _round_reply(request, site, "ok", "", fields).to_record()
        fields["training_cases"] = len(site.settings.training)
        require_noise(site.settings, request.mechanism)
        if request.mechanism:
            answer = train_privately(site, plan, state, request, request.mechanism)
            state = answer.state
            fields |= {
                "unit": UNIT,
                "epsilon": answer.epsilon,
                "delta": answer.delta,
                "steps": answer.steps,
                "seconds": answer.seconds,
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
                "loss": result.loss,
                "seconds": result.seconds,
            }
        name = site.settings.name
        site.cache.keep_trained(request.run, name, site.settings.training)
        if rule.personal or request.local_rank:
            site.cache.keep_personal(request.run, name, plan, request.round, state)
        sent = without_factors(global_part(state, request.local_rank), rule.absent)
        arrays = state_record(plan, sent, request.wire)
        return _round_reply(request, site, "ok", "", fields).to_record(arrays)

    return _answer(message, context, act, respond)


def _first_measured(
    site: Site, plan: AdaptationPlan, request: RoundRequest, content: RecordDict
) -> dict[str, object]:
    """Measure the state that the run started from; at the rank of the other one, if it can be."""
    arrays = content.array_records
    first = take_state(
        RecordDict({"arrays": arrays["first"]} if "first" in arrays else {}), plan, request.wire
    )
    common = silenced(with_local(first, None, request.local_rank, 0), request.local_rank)
    dice, counts = dice_by_label(plan, site.evaluate(plan, common))
    return {"first_dice": dice, "first_dice_cases": counts}


def _told_missing(site: Site, plan: AdaptationPlan) -> tuple[int, ...]:
    """Return the channels of missing labels; none where they may follow from a hidden person."""
    if site.settings.min_noise and site.settings.annotated is None:
        return ()
    return site.data.labels(plan.labels).missing


def _answer(
    message: Message,
    context: Context,
    act: Callable[[Site], RecordDict],
    respond: Callable[[Site, str, str], RecordDict],
) -> Message:
    """Let the site act; turn whatever goes wrong into an answer that gives nothing away.

    Where not even the site's own settings or the message can be read, the answer is empty.
    """
    content = RecordDict({})
    try:
        site = Site(site_of(context))
        content = respond(site, "failed", FAILED)
        content = act(site)
    except (ApprovalError, MessageError, StateError) as error:  # our own words, no names in them
        log.warning("refused: %s", error)
        content = respond(site, "refused", plain(error)) if content else content
    except Exception:  # nothing of it may leave the site
        log.exception("the site failed")
    return Message(content, reply_to=message)


def _offer_reply(
    site: Site,
    status: str,
    reason: str = "",
    training_cases: int = 0,
    validation_cases: int = 0,
    rank: int | None = None,
) -> RecordDict:
    return OfferReply.model_validate(
        {
            "software": software_version(),
            "site": site.settings.name,
            "status": status,
            "reason": reason,
            "training_cases": training_cases,
            "validation_cases": validation_cases,
            "rank": rank,
        }
    ).to_record()


def _base_reply(site: Site, status: str, reason: str = "") -> RecordDict:
    fields = {"site": site.settings.name, "status": status, "reason": reason}
    return BaseReply.model_validate(fields).to_record()


def _round_reply(
    request: RoundRequest, site: Site, status: str, reason: str, fields: Mapping[str, object]
) -> RoundReply:
    return RoundReply.model_validate(
        {
            "run": request.run,
            "round": request.round,
            "site": site.settings.name,
            "base_digest": request.base_digest,
            "plan_digest": request.plan_digest,
            "status": status,
            "reason": reason,
            **fields,
        }
    )
