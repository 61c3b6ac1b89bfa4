"""Turn a site's reply into an update, or into a reason why it is not one."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from dafne_federated.core.errors import DafneFederatedError, StateError
from dafne_federated.core.paired_changes import told
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import state_rank
from dafne_federated.core.wire import RoundReply, RoundRequest, plain
from dafne_federated.core.wire_arrays import take_state
from dafne_federated.strategies.aggregation import Update
from dafne_federated.strategies.column_weights import check_missing, missing_columns

log = logging.getLogger(__name__)

# No trained weight change is anywhere near this; it keeps float32 products from overflowing.
_LARGEST_VALUE = 1e4


@dataclass(frozen=True)
class Verdict:
    """What became of one reply.

    Attributes:
        status: ``ok``, ``refused`` (here or by the site), ``failed`` (at the site), ``silent``.
        reason: In words; empty if ok.
        reply: The typed half, if it could be read and answers this round; it stays where the
            update is refused, for the Dice that it reports is of what the site was sent.
        update: The update, if ok and the site trained.
    """

    status: Literal["ok", "refused", "failed", "silent"]
    reason: str = ""
    reply: RoundReply | None = None
    update: Update | None = None


def judge(
    site: str,
    content: RecordDict,
    request: RoundRequest,
    plan: AdaptationPlan,
    max_cases: int,
    sent: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Verdict:
    """Check one reply; nothing about it is trusted, and a bad one costs the round nothing.

    Checked in this order: the message itself; that it answers this round of this run, base and
    plan and comes from this site; that labels and the number of cases are plausible; names,
    shapes, dtypes and byte counts of the arrays before any of them is parsed; that all values are
    finite and of a size that a weight change can have; that stored statistics came back as sent.

    Args:
        site: Registered name of the site that the transport says it comes from.
        content: The reply.
        request: What was asked.
        plan: The plan of the run.
        max_cases: Largest number of training cases that is believed: what the site offered.
        sent: The state that the site was sent: the update is completed with the factors that
            stood still in this round, and stored statistics are compared with it.
    """
    checked: RoundReply | None = None
    try:
        reply = RoundReply.from_record(content)
        if reply.status != "ok":
            return Verdict(reply.status, reply.reason, reply)
        asked = (site, request.run, request.round, request.base_digest, request.plan_digest)
        given = (reply.site, reply.run, reply.round, reply.base_digest, reply.plan_digest)
        for name, wanted, got in zip(
            ("site", "run", "round", "base digest", "plan digest"), asked, given, strict=True
        ):
            if wanted != got:
                msg = f"{name}: expected {str(wanted)[:20]!r}, got {str(got)[:20]!r}"
                raise StateError(msg)
        if len(reply.dice) != len(reply.dice_cases) or len(reply.dice) not in (0, len(plan.labels)):
            msg = f"dice: expected {len(plan.labels)} labels, got {len(reply.dice)}"
            raise StateError(msg)
        sums = (reply.change_persons, reply.change_total, reply.change_squares)
        told(plan.labels, *sums, request.states)
        missing = check_missing(plan, reply.missing or ())
        checked = reply
        if request.epochs == 0:
            return Verdict("ok", reply=reply)
        if not 0 < reply.training_cases <= max_cases:
            msg = f"training cases: expected 1 to {max_cases}, got {reply.training_cases}"
            raise StateError(msg)
        if request.mechanism and (reply.unit is None or reply.epsilon is None):
            msg = "privacy: expected an update that hides persons and its epsilon, got one without"
            raise StateError(msg)
        state = take_state(content, plan, request.wire, absent=request.rule.absent)
        ends = tuple(f"/{part}" for part in request.rule.held)
        held = {name: value for name, value in (sent or {}).items() if name.endswith(ends)}
        if sent and (got := state_rank(plan, state)) != state_rank(plan, sent):
            msg = f"rank: expected {state_rank(plan, sent)} as it was sent, got {got}"
            raise StateError(msg)
        set_once = plan.state_shapes(trained=False)
        for key in set_once:
            if sent is None or state[key].tobytes() != sent[key].tobytes():
                msg = f"array {key!r}: expected the stored statistics as they were sent, got others"
                raise StateError(msg)
        for key in sorted(state.keys() - set_once.keys()):
            array = state[key]
            if (largest := float(np.abs(array).max(initial=0.0))) > _LARGEST_VALUE:
                msg = f"array {key!r}: expected values within {_LARGEST_VALUE:g}, got {largest:.3g}"
                raise StateError(msg)
    except DafneFederatedError as error:
        return Verdict("refused", plain(error), checked)
    except Exception:  # what a site sends must never end the round
        log.exception("a reply of %s cannot be read", site)
        return Verdict("refused", "its reply cannot be read", checked)
    columns = missing_columns(plan, missing)
    update = Update(site, state | held, reply.training_cases, missing=columns)
    return Verdict("ok", reply=reply, update=update)
