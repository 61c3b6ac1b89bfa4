"""Who takes part in a run: offer the base, send it where it is missing, keep the answers."""

import logging
from dataclasses import dataclass

import numpy as np
from flwr.serverapp import Grid

from dafne_federated.core.errors import DafneFederatedError, RunError
from dafne_federated.core.handshake import (
    difference,
    own_versions,
    versions_said,
    with_protocol,
)
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.core.wire import (
    QUERY_OFFER,
    TRAIN_BASE,
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    array_record,
    plain,
    record_bytes,
)
from dafne_federated.server.exchange import Replies, exchange, wait_for_nodes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Members:
    """The sites of a run.

    Attributes:
        nodes: Flower's node id by site name, for sites that take part.
        declined: Reason in words by site name, for those that do not.
        cases: Training cases that each site said to have; it cannot claim more later.
        ranks: The rank that each site chose, None where it takes that of the run.
        bytes_down: Bytes sent to each site to join: offer and, where it was missing, the base.
        bytes_up: Bytes it sent to join.
    """

    nodes: dict[str, int]
    declined: dict[str, str]
    cases: dict[str, int]
    ranks: dict[str, int | None]
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]


def gather(
    grid: Grid,
    folder: RunFolder,
    info: RunInfo,
    plan: AdaptationPlan,
    before: Members | None = None,
) -> Members:
    """Offer the run to every site online and see to it that each has the base.

    The base goes down once; a site that has it from an earlier run or round gets none.

    Args:
        grid: Flower's connection to the sites.
        folder: Where it is kept who takes part, unless they are those of ``before``.
        info: What the run was started with.
        plan: What is trained.
        before: Who took part at the last look.

    Raises:
        RunError: Fewer sites than ``min_sites`` are online or take part.
    """
    settings = info.settings
    ids = wait_for_nodes(grid, settings.min_sites, settings.wait)
    if len(ids) < settings.min_sites:
        msg = f"expected at least {settings.min_sites} sites, got {len(ids)} in {settings.wait} s"
        raise RunError(msg)
    base = folder.base_bytes()
    offer = Offer.model_validate(
        {
            **own_versions(),
            "run": info.run,
            "base_digest": info.base_digest,
            "base_bytes": len(base),
            "plan": plan.to_json(),
        }
    ).to_record()
    # Before anything is asked: who leaves in between must not get a name of its own choice.
    registered = {n.node_id: getattr(n, "name", "") for n in grid.get_nodes()}
    by_number = {f"node {node}": node for node in ids if node in registered}
    replies: Replies = exchange(
        grid, dict.fromkeys(by_number, offer), by_number, QUERY_OFFER, "0", settings.deadline,
        lambda _, content: content, retries=settings.retries,
    )  # fmt: skip
    members = Members({}, {}, {}, {}, {}, {})
    pairs = any(target.low_rank for target in plan.targets)
    needing = []
    for number, content in sorted(replies.items()):
        node = by_number[number]
        if content is None:
            members.declined[registered.get(node) or number] = "its program ended without an answer"
            continue
        said = versions_said(content)
        if said and (words := difference(said, with_protocol(own_versions()))):
            members.declined[registered.get(node) or number] = plain(words)
            continue
        try:
            reply = OfferReply.from_record(content)
        except DafneFederatedError as error:
            members.declined[registered.get(node) or number] = plain(error)
            continue
        name = registered.get(node) or reply.site
        rank = reply.rank if pairs else None  # whole arrays have none
        if name != reply.site:
            members.declined[name] = f"it calls itself {reply.site!r}"
        elif name in members.nodes:
            members.declined[number] = f"another site is called {name!r} already"
        elif reply.status not in ("have", "need"):
            members.declined[name] = reply.reason
        elif reason := _wrong_rank(rank, plan, settings):
            members.declined[name] = reason
        else:
            members.nodes[name] = node
            members.ranks[name] = rank
            members.cases[name] = min(reply.training_cases, settings.max_cases)
            members.bytes_down[name] = record_bytes(offer)
            members.bytes_up[name] = record_bytes(content)
            needing += [name] if reply.status == "need" else []
    for number in sorted(by_number.keys() - replies.keys()):
        name = registered.get(by_number[number]) or number
        members.declined[name] = f"no answer within {settings.deadline:g} s"
    _send_base(grid, info, base, needing, members)
    for name, reason in sorted(members.declined.items()):
        log.warning("%s does not take part: %s", name, reason)
    same = before and (before.nodes.keys(), before.declined)
    if same != (members.nodes.keys(), members.declined):
        folder.event("members", sites=sorted(members.nodes), declined=members.declined)
    if len(members.nodes) < settings.min_sites:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(members.declined.items()))
        msg = f"expected at least {settings.min_sites} sites, got {len(members.nodes)}; {reasons}"
        raise RunError(msg)
    return members


def _wrong_rank(rank: int | None, plan: AdaptationPlan, settings: RunSettings) -> str:
    """Return why a site cannot take part with the rank that it chose; empty if it can."""
    if rank is None or rank == plan.rank:
        return ""
    strategy, rules = settings.strategy, STRATEGY_TABLE[settings.strategy]
    largest = plan.max_rank - (settings.local_rank if rules.local else 0)
    if rank > largest:
        return f"it trains at rank {rank}, the plan allows at most {largest}"
    if not rules.ranks:
        return (
            f"it trains at rank {rank}, and strategy {strategy!r} needs the plan's {plan.rank} "
            "everywhere; take strategy 'product'"
        )
    return ""


def _send_base(
    grid: Grid, info: RunInfo, base: bytes, needing: list[str], members: Members
) -> None:
    if not needing:
        return
    arrays = array_record({"base": np.frombuffer(base, np.uint8)})
    content = BaseModelBytes(run=info.run, base_digest=info.base_digest).to_record(arrays)
    nodes = {name: members.nodes[name] for name in needing}
    replies = exchange(
        grid, dict.fromkeys(nodes, content), nodes, TRAIN_BASE, "0", info.settings.deadline,
        lambda _, content: content, retries=info.settings.retries,
    )  # fmt: skip
    for name in needing:
        members.bytes_down[name] += record_bytes(content)
        answer = replies.get(name)
        reason = f"no answer within {info.settings.deadline:g} s"
        if answer is not None:
            members.bytes_up[name] += record_bytes(answer)
            try:
                reply = BaseReply.from_record(answer)
            except DafneFederatedError as error:
                reason = plain(error)
            else:
                reason = "" if reply.status == "stored" else reply.reason or reply.status
        if reason:
            members.declined[name] = reason
            del members.nodes[name]
