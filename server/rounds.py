"""The rounds of a federation: send the state, judge the answers, combine, keep, go on.

A finished round is on disk before the next begins; a run that is started again goes on after
the last finished round and ends in the same bits, because everything random follows from the
run's seed, the site's name and the round. Who trains is in ``sampling.py``, when a round closes in
``quorum.py``, and what becomes of answers after that in ``late_answers.py``.
"""

import logging
import time
import zlib
from collections.abc import Collection

from flwr.app import RecordDict
from flwr.serverapp import Grid

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.errors import RunError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.paired_changes import told
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.rank_cut import Cut, Cuts, at_rank, site_ranks
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, initial_state, state_rank, without_factors
from dafne_federated.core.strategy_table import (
    COORDINATE_RULES,
    STRATEGY_TABLE,
    bad_left,
    round_rule,
)
from dafne_federated.core.wire import RoundRequest, record_bytes
from dafne_federated.core.wire_arrays import rounded, state_record
from dafne_federated.server.answers import (
    Answer,
    lacked,
    receive,
    with_same_labels,
    without_outliers,
)
from dafne_federated.server.late_answers import LateAnswer, with_late
from dafne_federated.server.membership import Members, gather
from dafne_federated.server.questions import Ask, Questions
from dafne_federated.server.quorum import Answers, collect, refused_here, suffices
from dafne_federated.server.sampling import sampled
from dafne_federated.server.server_optimiser import stepped
from dafne_federated.server.site_noise import (
    bounded_updates,
    require_site_noise,
    with_site_epsilon,
    with_site_noise,
)
from dafne_federated.server.statistics import pool_statistics, with_statistics
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.outliers import update_norm
from dafne_federated.strategies.robust import ROBUST_RULES
from dafne_federated.strategies.update_gate import Verdict

log = logging.getLogger(__name__)


def run_rounds(grid: Grid, folder: RunFolder) -> None:
    """Run, or go on with, the federation in ``folder`` up to and including its last evaluation.

    Raises:
        RunError: Too few sites take part, or too few updates of a round could be used; a run
            that is started again begins with that round.
    """
    info, plan = folder.info(), folder.plan()
    done = folder.rounds()
    last = done[-1].round if done else 0
    state = folder.state_after(last) if done else first_state(info, plan)
    if last > info.settings.rounds:
        return
    require_site_noise(folder, info.settings)
    members = gather(grid, folder, info, plan)
    pooled = pool_statistics(grid, folder, members, first_state(info, plan))
    if not done:
        state = rounded(plan, with_statistics(folder, state, pooled), info.settings.wire)
    classes, questions = pooled.classes, Questions(grid)
    for number in range(last + 1, info.settings.rounds + 2):
        line, state = _round(
            questions, folder, info, plan, members, state, number, joined=last + 1, classes=classes
        )
        folder.finish_round(line, state)
        error = line.aggregation_error
        folder.event("round finished", round=number, trained=line.trained, aggregation_error=error)
        log.info("round %d finished in %.1f s", number, line.seconds)


def first_state(info: RunInfo, plan: AdaptationPlan) -> State:
    """Return the state that a run starts from; it changes nothing."""
    state = initial_state(plan, zlib.crc32(f"{info.settings.seed}/initial state".encode()))
    return rounded(plan, state, info.settings.wire)


def _round(
    questions: Questions,
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
    rule, mechanism = round_rule(settings.strategy, number), settings.mechanism
    candidates = sorted(members.nodes) if trained else []
    training = set(sampled(candidates, settings.sites_per_round, settings.seed, number))
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
        noise=mechanism.noise if mechanism and trained else None,
        clip=mechanism.clip if mechanism and trained else None,
        person_rate=mechanism.rate if mechanism and trained else None,
        optimiser=settings.optimiser,
        proximal=settings.proximal,
        local_rank=settings.local_rank if STRATEGY_TABLE[settings.strategy].local else 0,
    )
    cuts = _cuts(plan, members, state, settings, number, training)
    asks = _asks(plan, request, cuts, training)
    folder.event(
        "round started",
        round=number,
        sites=sorted(asks),
        trained=trained,
        training=sorted(training),
    )

    def judge(site: str, content: RecordDict | None, ask: Ask) -> Answer:
        folder.event("site answered", round=ask.request.round, site=site)
        return receive(folder, site, content, ask.request, plan, members.cases[site], ask.cut)

    # Like what comes back: a factor that stays at the sites does not count.
    known = update_norm(plan, without_factors(state, rule.personal))
    before = folder.rounds()
    silent = Answer(Verdict("silent", f"no answer within {settings.deadline:g} s"))

    def closed(received: Answers, late: list[LateAnswer]) -> Answers:
        answers = {site: received.get(site, silent) for site in sorted(asks)}
        if trained:
            answers = with_late(answers, late, number)
        answers = with_same_labels(answers, plan, before)
        return without_outliers(answers, known, before, settings.norm_ratio_used)

    questions.age(number - 1 if settings.late == "use" else number)
    received, late, attempts = collect(
        questions,
        asks,
        members.nodes,
        settings,
        judge,
        lambda received, late: suffices(closed(received, late), settings, trained),
    )
    answers = closed(received, late)
    _tell_late(folder, answers, late, number)
    updates = [answer.verdict.update for answer in answers.values() if answer.verdict.update]
    first = number == joined
    sites = {
        site: _site_round(
            plan,
            answer,
            not trained or site in training,
            # What joining cost is counted with the first round after it.
            record_bytes(asks[site].content) + (members.bytes_down[site] if first else 0),
            answer.bytes
            + sum(item.bytes for item in late if item.site == site)
            + (members.bytes_up[site] if first else 0),
        )
        for site, answer in answers.items()
    }
    for site, verdict in ((site, answer.verdict) for site, answer in answers.items()):
        if verdict.status != "ok":
            log.warning("round %d: %s: %s: %s", number, site, verdict.status, verdict.reason)
            folder.event("not used", round=number, site=site, reason=verdict.reason)
    if not suffices(answers, settings, trained):
        raise _too_few(number, settings, answers, len(updates), trained)
    error, combining = None, time.monotonic()
    if trained:
        bad = bad_left(settings.robust, settings.bad_sites, len(updates), refused_here(answers))
        chosen = ROBUST_RULES[settings.robust](plan, updates, bad or 0, state)
        chosen = bounded_updates(settings, plan, number, state, chosen)
        weighs = settings.robust not in ("none", *COORDINATE_RULES)
        if weighs or any(update.share < 1 for update in chosen):
            shares = {update.site: update.share for update in chosen if update.site in sites}
            for site in sites:
                sites[site] = sites[site].model_copy(update={"share": shares.get(site, 0.0)})
            folder.event("weighed", round=number, rule=settings.robust, bad=bad, shares=shares)
        aggregate = STRATEGIES[settings.strategy](plan, chosen)
        # What is kept and may be released is what the sites will get and evaluate.
        count = len(updates)
        mean = with_site_noise(folder, settings, plan, number, state, aggregate.state, count)
        new = stepped(folder, settings, plan, number, state, mean)
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
        attempts=attempts,
        aggregation_seconds=time.monotonic() - combining if trained else 0.0,
    )
    return with_site_epsilon(line, settings), state


def _asks(
    plan: AdaptationPlan, request: RoundRequest, cuts: Cuts, training: Collection[str]
) -> dict[str, Ask]:
    """Return what each site is asked: to train, or to measure the state only."""
    measuring = request.model_copy(update={"epochs": 0, "class_pixels": None, "class_slices": None})
    arrays = {r: state_record(plan, cut.state, request.wire) for r, cut in cuts.by_rank.items()}
    made: dict[tuple[int, bool], Ask] = {}
    for rank, trains in {(rank, site in training) for site, rank in cuts.ranks.items()}:
        own = request if trains else measuring
        made[rank, trains] = Ask(own, own.to_record(arrays[rank]), cuts.by_rank[rank])
    return {site: made[rank, site in training] for site, rank in cuts.ranks.items()}


def _cuts(
    plan: AdaptationPlan,
    members: Members,
    state: State,
    settings: RunSettings,
    number: int,
    training: Collection[str],
) -> Cuts:
    """Cut the state to the rank of each site that trains; others measure the state itself."""
    rules, rank = STRATEGY_TABLE[settings.strategy], state_rank(plan, state)
    ranks = dict.fromkeys(members.nodes, rank)
    if not rules.ranks or not training:
        return Cuts(ranks, {rank: Cut(state, {})})
    chosen = {site: members.ranks[site] for site in sorted(training)}
    ranks |= site_ranks(plan, state, chosen, rules.grows)
    seed = zlib.crc32(f"{settings.seed}/new directions/{number}".encode())
    cuts = {rank: at_rank(plan, state, rank, seed) for rank in sorted(set(ranks.values()))}
    wire = settings.wire
    return Cuts(ranks, {r: Cut(rounded(plan, c.state, wire), c.rest) for r, c in cuts.items()})


def _tell_late(folder: RunFolder, answers: Answers, late: list[LateAnswer], number: int) -> None:
    for item in late:
        used = answers[item.site].late and item.round == number - 1
        log.warning("an answer of %s to round %d came late", item.site, item.round)
        folder.event("late answer", site=item.site, round=item.round, during=number, used=used)


def _too_few(
    number: int, settings: RunSettings, answers: Answers, updates: int, trained: bool
) -> RunError:
    reasons = "; ".join(
        f"{site}: {answer.verdict.reason}"
        for site, answer in answers.items()
        if answer.verdict.reason
    )
    what = "updates" if trained else "sites that measure the last state"
    if not trained:
        updates = sum(answer.verdict.status == "ok" for answer in answers.values())
    msg = f"round {number}: expected {settings.min_sites} {what}, got {updates}; {reasons}"
    if trained and updates + refused_here(answers) >= settings.min_sites:
        msg += f"; robust {settings.robust!r} cannot bear {settings.bad_sites} bad sites with these"
    return RunError(f"{msg}; started again, the run goes on with this round")


def _site_round(plan: AdaptationPlan, answer: Answer, asked: bool, down: int, up: int) -> SiteRound:
    fields: dict[str, object] = {}
    verdict = answer.verdict
    if (reply := verdict.reply) is not None and reply.status == "ok":
        measured = zip(plan.labels, reply.dice, reply.dice_cases, strict=False)
        rows = [(label, value if count else None, count) for label, value, count in measured]
        sums = (reply.change_persons, reply.change_total, reply.change_squares)
        choose, accept = told(plan.labels, *sums)
        # The Dice is of what was sent, and counts whatever became of the update.
        fields = {
            "dice": {label: value for label, value, _ in rows},
            "dice_cases": {label: count for label, _, count in rows},
            "choose": choose,
            "accept": accept,
        }
    if (spent := answer.training or reply) is not None and spent.status == "ok":
        # Whatever became of the update.
        fields |= {"epsilon": spent.epsilon, "delta": spent.delta, "steps": spent.steps}
    fields["lacks"] = lacked(plan, answer)
    if answer.late and verdict.update is not None:
        fields |= {"training_cases": verdict.update.cases, "update_norm": answer.norm}
    elif reply is not None and verdict.status == "ok":
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
            "status": "late" if answer.late else verdict.status,
            "reason": verdict.reason,
            "asked": asked,
            "bytes_down": down,
            "bytes_up": up,
            **fields,
        }
    )
