"""The Flower ClientApp of a site: read the message, let the site act, answer.

Whatever goes wrong at a site, its answer holds a status and plain words of ours: texts of
exceptions, paths and names never leave.
"""

import logging
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dafne_federated.client.site import Site, dice_by_label
from dafne_federated.client.site_settings import site_of
from dafne_federated.core.errors import ApprovalError, MessageError, ModelFileError, StateError
from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.versions import software_version
from dafne_federated.core.wire import (
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
)
from dafne_federated.core.wire_arrays import take_bytes, take_state

log = logging.getLogger(__name__)

LARGEST_BASE = 4 * 2**30  # bytes
Answer = Callable[[str, str], RecordDict]

app = ClientApp()


@app.query("offer")
def consider_offer(message: Message, context: Context) -> Message:
    """Say whether this site takes part and whether it has the base."""
    site = Site(site_of(context))

    def answer(status: str, reason: str = "") -> RecordDict:
        return OfferReply.model_validate(
            {
                "software": software_version(),
                "site": site.settings.name,
                "status": status,
                "reason": reason,
                "training-cases": len(site.settings.training),
                "validation-cases": len(site.settings.validation),
            }
        ).to_record()

    def act() -> RecordDict:
        offer = Offer.from_record(message.content)
        if offer.software != software_version():
            msg = f"this site runs version {software_version()}, the server {offer.software}"
            raise ApprovalError(msg)
        plan = AdaptationPlan.from_json(offer.plan)
        if plan.base_digest != offer.base_digest:
            msg = "the plan belongs to another base than the one offered"
            raise MessageError(msg)
        site.consider(plan)
        return answer("have" if site.cache.has_base(plan.base_digest) else "need")

    return Message(_guarded(act, answer), reply_to=message)


@app.train("base")
def store_base(message: Message, context: Context) -> Message:
    """Check and keep the bytes of the base; nothing of it is executed here."""
    site = Site(site_of(context))

    def answer(status: str, reason: str = "") -> RecordDict:
        fields = {"site": site.settings.name, "status": status, "reason": reason}
        return BaseReply.model_validate(fields).to_record()

    def act() -> RecordDict:
        request = BaseModelBytes.from_record(message.content)
        if not site.approvals.allows(request.base_digest):
            msg = f"base model {request.base_digest[:16]} is not approved at this site"
            raise ApprovalError(msg)
        data = take_bytes(message.content, "base", LARGEST_BASE)
        if (digest := sha256(data)) != request.base_digest:
            msg = f"base model: expected digest {request.base_digest[:16]}, got {digest[:16]}"
            raise MessageError(msg)
        site.cache.keep_base(data)
        return answer("stored")

    return Message(_guarded(act, answer), reply_to=message)


@app.train("round")
@app.evaluate("state")
def run_round(message: Message, context: Context) -> Message:
    """Evaluate the state that came, train from it, and send the new one."""
    site = Site(site_of(context))
    request = RoundRequest.from_record(message.content)

    def reply(status: str, reason: str, **fields: object) -> RoundReply:
        return RoundReply.model_validate(
            {
                "run": request.run,
                "round": request.round,
                "site": site.settings.name,
                "base-digest": request.base_digest,
                "plan-digest": request.plan_digest,
                "status": status,
                "reason": reason,
                **fields,
            }
        )

    def answer(status: str, reason: str = "") -> RecordDict:
        return reply(status, reason).to_record()

    def act() -> RecordDict:
        plan = site.known_plan(request.plan_digest)
        state = take_state(message.content, plan)
        begun = time.monotonic()
        dice, counts = dice_by_label(plan, site.evaluate(plan, state))
        fields: dict[str, object] = {
            "dice": dice,
            "dice-cases": counts,
            "evaluation-seconds": time.monotonic() - begun,
            "device": site.device().name,
        }
        if request.epochs == 0:
            return reply("ok", "", **fields).to_record()
        state, result, slices = site.train(
            plan,
            state,
            request.epochs,
            request.batch_size,
            request.learning_rate,
            request.seed,
            request.round,
        )
        fields |= {
            "training-cases": len(site.settings.training),
            "training-slices": slices,
            "loss": result.loss,
            "seconds": result.seconds,
        }
        return reply("ok", "", **fields).to_record(state)

    return Message(_guarded(act, answer), reply_to=message)


def _guarded(act: Callable[[], RecordDict], answer: Answer) -> RecordDict:
    """Run ``act``; turn what goes wrong into an answer that gives nothing away."""
    try:
        return act()
    except (ApprovalError, MessageError, StateError) as error:  # our own words, no names in them
        log.warning("refused: %s", error)
        return answer("refused", str(error)[:500])
    except ModelFileError:
        log.exception("the base model cannot be used")
        return answer("failed", "the base model cannot be used at this site; its log says why")
    except Exception:  # nothing of it may leave the site
        log.exception("the site failed")
        return answer("failed", "the site could not do this; its own log says why")
