"""The rounds of a federation: send the state, judge the answers, combine, keep, go on.

A finished round is on disk before the next begins; a run that is started again goes on after
the last finished round and ends in the same bits, because everything random follows from the
run's seed, the site's name and the round.
"""

import logging
import time
import zlib

from flwr.app import RecordDict
from flwr.serverapp import Grid

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.errors import RunError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.rank_cut import Cut, Cuts, at_rank, site_ranks
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, initial_state, state_rank, without_factors
from dafne_federated.core.strategy_table import STRATEGY_TABLE, round_rule
from dafne_federated.core.wire import (
    EVALUATE_STATE,
    TRAIN_ROUND,
    RoundRequest,
    record_bytes,
)
from dafne_federated.core.wire_arrays import rounded, state_record
from dafne_federated.server.answers import Answer, receive, without_outliers
from dafne_federated.server.exchange import exchange
from dafne_federated.server.membership import Members, gather
from dafne_federated.server.server_optimiser import stepped
from dafne_federated.server.statistics import pool_statistics, with_statistics
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.outliers import update_norm
from dafne_federated.strategies.robust import ROBUST_RULES
from dafne_federated.strategies.update_gate import Verdict

log = logging.getLogger(__name__)


def run_rounds(grid: Grid, folder: RunFolder) -> None:
    """Run, or go on with, the federation in ``folder`` up to and including its last evaluation.

    Raises:
        RunError: Too few sites take part, or too few updates of a round could be used.
    """
    info, plan = folder.info(), folder.plan()
    done = folder.rounds()
    last = done[-1].round if done else 0
    state = folder.state_after(last) if done else first_state(info, plan)
    if last > info.settings.rounds:
        return
    members = gather(grid, folder, info, plan)
    pooled = pool_statistics(grid, folder, members, first_state(info, plan))
    if not done:
        state = rounded(plan, with_statistics(folder, state, pooled), info.settings.wire)
    classes = pooled.classes
    for number in range(last + 1, info.settings.rounds + 2):
        line, state = _round(
            grid, folder, info, plan, members, state, number, joined=last + 1, classes=classes
        )
        folder.finish_round(line, state)
        folder.event("round finished", round=number, trained=line.trained)
        log.info("round %d finished in %.1f s", number, line.seconds)


def first_state(info: RunInfo, plan: AdaptationPlan) -> State:
    """Return the state that a run starts from; it changes nothing."""
    state = initial_state(plan, zlib.crc32(f"{info.settings.seed}/initial state".encode()))
    return rounded(plan, state, info.settings.wire)


def _round(
    grid: Grid,
    folder: RunFolder,
    info: RunInfo,
    plan: AdaptationPlan,
    members: Members,
    state: State,
    number: int,
    joined: int,
    classes: ClassCounts | None,
) -> tuple[RoundLine, State]:
    settings, begun = info.settings, time.monotonic()
    trained = number <= settings.rounds
    rule = round_rule(settings.strategy, number)
    request = RoundRequest(
        run=info.run,
        round=number,
        base_digest=info.base_digest,
        plan_digest=info.plan_digest,
        epochs=settings.epochs if trained else 0,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate_in(number),
        seed=settings.seed,
        trained=rule.trained,
        sent=rule.sent,
        wire=settings.wire,
        class_pixels=list(classes.pixels) if classes and trained else None,
        class_slices=list(classes.slices) if classes and trained else None,
        optimiser=settings.optimiser,
        proximal=settings.proximal,
        local_rank=settings.local_rank if STRATEGY_TABLE[settings.strategy].local else 0,
    )
    cuts = _cuts(plan, members, state, settings, number)
    contents = {
        rank: request.to_record(state_record(plan, cut.state, settings.wire))
        for rank, cut in cuts.by_rank.items()
    }
    sent = {site: contents[rank] for site, rank in cuts.ranks.items()}
    folder.event("round started", round=number, sites=sorted(members.nodes), trained=trained)

    def take(site: str, content: RecordDict | None) -> Answer:
        folder.event("site answered", round=number, site=site)
        cases = members.cases[site]
        return receive(folder, site, content, request, plan, cases, cuts.of(site))

    received = exchange(
        grid,
        sent,
        members.nodes,
        TRAIN_ROUND if trained else EVALUATE_STATE,
        str(number),
        settings.deadline,
        take,
    )
    silent = Answer(Verdict("silent", f"no answer within {settings.deadline:g} s"))
    answers = {site: received.get(site, silent) for site in sorted(members.nodes)}
    # Like what comes back: a factor that stays at the sites does not count.
    known = update_norm(plan, without_factors(state, rule.personal))
    ratio = settings.max_norm_ratio
    answers = without_outliers(answers, known, folder.rounds(), ratio)
    updates = [answer.verdict.update for answer in answers.values() if answer.verdict.update]
    first = number == joined
    sites = {
        site: _site_round(
            plan,
            answer,
            # What joining cost is counted with the first round after it.
            record_bytes(sent[site]) + (members.bytes_down[site] if first else 0),
            answer.bytes + (members.bytes_up[site] if first else 0),
        )
        for site, answer in answers.items()
    }
    for site, verdict in ((site, answer.verdict) for site, answer in answers.items()):
        if verdict.status != "ok":
            log.warning("round %d: %s: %s: %s", number, site, verdict.status, verdict.reason)
            folder.event("not used", round=number, site=site, reason=verdict.reason)
    error = None
    if trained:
        if len(updates) < settings.min_sites:
            reasons = "; ".join(f"{s}: {r.reason}" for s, r in sites.items() if r.reason)
            got = f"{len(updates)}; {reasons}"
            msg = f"round {number}: expected {settings.min_sites} updates, got {got}"
            raise RunError(msg)
        chosen = ROBUST_RULES[settings.robust](plan, updates, settings.bad_sites, state)
        if settings.robust != "none" or any(update.share < 1 for update in chosen):
            shares = {update.site: update.share for update in chosen if update.site in sites}
            for site in sites:
                sites[site] = sites[site].model_copy(update={"share": shares.get(site, 0.0)})
            folder.event("weighed", round=number, rule=settings.robust, shares=shares)
        aggregate = STRATEGIES[settings.strategy](plan, chosen)
        # What is kept and may be released is what the sites will get and evaluate.
        new = stepped(folder, settings, plan, number, state, aggregate.state)
        state, error = rounded(plan, new, settings.wire), aggregate.error
        log.info("round %d: aggregation error %.2g", number, error)
    line = RoundLine(
        round=number,
        trained=trained,
        sites=sites,
        aggregation_error=error,
        state_digest=arrays_digest(state),
        seconds=time.monotonic() - begun,
        whole=cuts.whole,
    )
    return line, state


def _cuts(
    plan: AdaptationPlan, members: Members, state: State, settings: RunSettings, number: int
) -> Cuts:
    """Cut the state to the rank of each site; the last evaluation is of the state itself."""
    rules, rank = STRATEGY_TABLE[settings.strategy], state_rank(plan, state)
    if not rules.ranks or number > settings.rounds:
        return Cuts(dict.fromkeys(members.nodes, rank), {rank: Cut(state, {})})
    ranks = site_ranks(plan, state, {s: members.ranks[s] for s in members.nodes}, rules.grows)
    seed = zlib.crc32(f"{settings.seed}/new directions/{number}".encode())
    cuts = {rank: at_rank(plan, state, rank, seed) for rank in sorted(set(ranks.values()))}
    wire = settings.wire
    return Cuts(ranks, {r: Cut(rounded(plan, c.state, wire), c.rest) for r, c in cuts.items()})


def _site_round(plan: AdaptationPlan, answer: Answer, down: int, up: int) -> SiteRound:
    fields: dict[str, object] = {}
    verdict = answer.verdict
    if (reply := verdict.reply) is not None and reply.status == "ok":
        measured = zip(plan.labels, reply.dice, reply.dice_cases, strict=False)
        rows = [(label, value if count else None, count) for label, value, count in measured]
        # The Dice is of what was sent, and counts whatever became of the update.
        fields = {
            "dice": {label: value for label, value, _ in rows},
            "dice_cases": {label: count for label, _, count in rows},
        }
    if reply is not None and verdict.status == "ok":
        fields |= {
            "training_cases": reply.training_cases,
            "training_slices": reply.training_slices,
            "loss": reply.loss,
            "seconds": reply.seconds,
            "evaluation_seconds": reply.evaluation_seconds,
            "device": reply.device,
            "update_norm": answer.norm,
        }
    return SiteRound.model_validate(
        {
            "status": verdict.status,
            "reason": verdict.reason,
            "bytes_down": down,
            "bytes_up": up,
            **fields,
        }
    )
