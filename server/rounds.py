"""The rounds of a federation: send the state, judge the answers, combine, keep, go on.

A finished round is on disk before the next begins; a run that is started again goes on after
the last finished round and ends in the same bits, because everything random follows from the
run's seed, the site's name and the round. What sites are asked is in ``round_asks.py``, when a
round closes in ``quorum.py``, what becomes of answers after that in ``late_answers.py``, what the
updates come to in ``combining.py``, and what is kept of it all in ``round_record.py``.
"""

import logging
import time
import zlib

from flwr.app import RecordDict
from flwr.serverapp import Grid

from dafne_federated.core.files import arrays_digest
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo
from dafne_federated.core.state import State, initial_state, without_factors
from dafne_federated.core.strategy_table import round_rule
from dafne_federated.core.wire_arrays import rounded
from dafne_federated.server.answers import Answer, receive, with_same_labels, without_outliers
from dafne_federated.server.combining import Combination, combined
from dafne_federated.server.continuation import continuation, start_state
from dafne_federated.server.federation import Federation
from dafne_federated.server.late_answers import LateAnswer, with_late
from dafne_federated.server.membership import gather
from dafne_federated.server.questions import Ask, Questions
from dafne_federated.server.quorum import Answers, collect, refused_here, suffices
from dafne_federated.server.round_asks import RoundAsks, round_asks
from dafne_federated.server.round_record import site_rounds, too_few
from dafne_federated.server.site_noise import require_site_noise, with_site_epsilon
from dafne_federated.server.statistics import pool_statistics, with_statistics
from dafne_federated.strategies.outliers import update_norm
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
    continued = continuation(folder)
    first = start_state(folder, continued) if continued else first_state(info, plan)
    state = folder.state_after(last) if done else first
    if last > info.settings.rounds:
        return
    require_site_noise(folder, info.settings)
    members = gather(grid, folder, info, plan)
    pooled = pool_statistics(grid, folder, members, first)
    if not done:
        state = rounded(plan, with_statistics(folder, state, pooled), info.settings.wire)
    run = Federation(folder, info, plan, members, last + 1, first, pooled.classes, continued)
    questions = Questions(grid)
    for number in range(last + 1, info.settings.rounds + 2):
        line, state = _round(run, questions, state, number)
        folder.finish_round(line, state)
        error = line.aggregation_error
        folder.event("round finished", round=number, trained=line.trained, aggregation_error=error)
        log.info("round %d finished in %.1f s", number, line.seconds)


def first_state(info: RunInfo, plan: AdaptationPlan) -> State:
    """Return the state that a run starts from; it changes nothing."""
    state = initial_state(plan, zlib.crc32(f"{info.settings.seed}/initial state".encode()))
    return rounded(plan, state, info.settings.wire)


def _round(
    run: Federation, questions: Questions, state: State, number: int
) -> tuple[RoundLine, State]:
    settings, folder, begun = run.settings, run.folder, time.monotonic()
    asks = round_asks(run, number, state)
    folder.event(
        "round started",
        round=number,
        sites=sorted(asks.by_site),
        trained=asks.trains,
        training=sorted(asks.training),
    )
    answers, late, attempts = _answers(run, questions, asks, state, number)
    _tell(folder, answers, late, number)
    sites = site_rounds(run, number, asks, answers, late)
    if not suffices(answers, settings, asks.trains):
        raise too_few(number, settings, answers, asks.trains)
    result = Combination(state)
    if asks.trains:
        updates = [answer.verdict.update for answer in answers.values() if answer.verdict.update]
        result = combined(run, number, state, updates, refused_here(answers))
    if (shares := result.shares) is not None:
        sites = {n: s.model_copy(update={"share": shares.get(n, 0.0)}) for n, s in sites.items()}
    line = RoundLine(
        round=number,
        trained=asks.trains,
        sites=sites,
        aggregation_error=result.error,
        state_digest=arrays_digest(result.state),
        seconds=time.monotonic() - begun,
        whole=asks.whole,
        attempts=attempts,
        aggregation_seconds=result.seconds,
    )
    return with_site_epsilon(line, settings), result.state


def _answers(
    run: Federation, questions: Questions, asks: RoundAsks, state: State, number: int
) -> tuple[Answers, list[LateAnswer], int]:
    """Ask until the round closes; return the answers by site, late ones, and how often it was."""
    settings, plan, before = run.settings, run.plan, run.folder.rounds()
    # Like what comes back: a factor that stays at the sites does not count.
    personal = round_rule(settings.strategy, number).personal
    known = update_norm(plan, without_factors(state, personal))
    silent = Answer(Verdict("silent", f"no answer within {settings.deadline:g} s"))

    def judge(site: str, content: RecordDict | None, ask: Ask) -> Answer:
        run.folder.event("site answered", round=ask.request.round, site=site)
        cases = run.members.cases[site]
        return receive(run.folder, site, content, ask.request, plan, cases, ask.cut)

    def closed(received: Answers, late: list[LateAnswer]) -> Answers:
        answers = {site: received.get(site, silent) for site in sorted(asks.by_site)}
        if asks.trains:
            answers = with_late(answers, late, number)
        answers = with_same_labels(answers, plan, before)
        return without_outliers(answers, known, before, settings.norm_ratio_used)

    def enough(received: Answers, late: list[LateAnswer]) -> bool:
        return suffices(closed(received, late), settings, asks.trains)

    questions.age(number - 1 if settings.late == "use" else number)
    nodes = run.members.nodes
    received, late, attempts = collect(questions, asks.by_site, nodes, settings, judge, enough)
    return closed(received, late), late, attempts


def _tell(folder: RunFolder, answers: Answers, late: list[LateAnswer], number: int) -> None:
    for item in late:
        used = answers[item.site].late and item.round == number - 1
        log.warning("an answer of %s to round %d came late", item.site, item.round)
        folder.event("late answer", site=item.site, round=item.round, during=number, used=used)
    for site, verdict in ((site, answer.verdict) for site, answer in answers.items()):
        if verdict.status != "ok":
            log.warning("round %d: %s: %s: %s", number, site, verdict.status, verdict.reason)
            folder.event("not used", round=number, site=site, reason=verdict.reason)
