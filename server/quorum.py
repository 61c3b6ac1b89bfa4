"""When a round closes: all have answered, or time is up and there are enough.

1. It closes as soon as every site that was asked has answered.
2. At the deadline it closes with what is there, if that is enough.
3. Else it waits ``grace`` seconds longer, until it is enough.
4. Else the sites that gave no answer are asked again, ``retries`` times, each with the same
   deadline and grace, once they are online. A refused answer would be the same again, so nobody
   asks for it.
5. Else the caller ends the run; the round leaves nothing behind, and a run that is started again
   begins with it.

An asked-again site trains from the same state with the same seed, so that it does not matter which
of the messages it answers. A site that lost what it was asked, or whose answer was lost, is asked
again at once; that is no retry. Nor is it one where a site was offline for a while: Flower lets go
of what it was asked, and of its answer too, so it is asked again when it is back.
Every wait has an end: ``(deadline + grace) * (retries + 1)`` in all.
"""

import logging
import time
from collections.abc import Callable, Mapping

from flwr.app import RecordDict
from flwr.common.constant import ErrorCode

from dafne_federated.core.settings import RunSettings
from dafne_federated.core.strategy_table import BOUNDED_RULES, updates_suffice
from dafne_federated.core.wire import record_bytes
from dafne_federated.server.answers import Answer
from dafne_federated.server.late_answers import LateAnswer
from dafne_federated.server.lost_messages import LOOK
from dafne_federated.server.questions import Ask, Question, Questions
from dafne_federated.strategies.update_gate import Verdict

log = logging.getLogger(__name__)

Answers = dict[str, Answer]
Judge = Callable[[str, RecordDict | None, Ask], Answer]


def collect(
    questions: Questions,
    asks: Mapping[str, Ask],
    nodes: Mapping[str, int],
    settings: RunSettings,
    judge: Judge,
    enough: Callable[[Answers, list[LateAnswer]], bool],
    poll: float = 0.5,
) -> tuple[Answers, list[LateAnswer], int]:
    """Ask sites until the round closes.

    Args:
        questions: Where messages without an answer are kept from round to round.
        asks: By site; all of one round.
        nodes: Flower's node id by site.
        settings: Those of the run.
        judge: Called with each answer as soon as it is in.
        enough: Whether the round may close with these answers.
        poll: Pause between two looks, in seconds.

    Returns:
        The answers by site (of silent sites only those that were away at the end are in it), those
        to earlier rounds, and how often the sites were asked.
    """
    answers: Answers = {}
    late: list[LateAnswer] = []
    number = next(iter(asks.values())).request.round
    waiting = set(asks)
    attempts = 0
    wait = settings.deadline + settings.grace
    while True:
        attempts += 1
        away: set[str] = set()
        questions.ask({site: asks[site] for site in waiting}, nodes, wait)
        end, look = time.monotonic() + settings.deadline, time.monotonic() + LOOK
        while waiting:
            found = questions.answers()
            for question, content in found:
                if question.round != number:
                    if isinstance(content, RecordDict):  # else the transport gave up on it
                        late.append(_late(question, content, judge))
                    continue
                site = question.site
                if content == ErrorCode.NODE_UNAVAILABLE:
                    away |= {site} & waiting
                    continue
                given = content if isinstance(content, RecordDict) else None
                answers[site] = judge(site, given, asks[site])
                if not _may_yet(answers[site]):
                    questions.forget(site, number)
                    away.discard(site)
                if site not in away and not questions.waits_for(site, number):
                    waiting.discard(site)
            if not waiting or found:  # what is in already is never late
                continue
            if time.monotonic() > look:
                look = time.monotonic() + LOOK
                back = questions.online(away, nodes) if away else []
                if again := sorted({*questions.lost(waiting - away, nodes), *back}):
                    log.warning("%s: message or answer lost, asked again", ", ".join(again))
                    questions.ask({site: asks[site] for site in again}, nodes, wait)
                    away -= set(again)
            over = time.monotonic() - end
            if over > 0 and (over > settings.grace or enough(answers, late)):
                break
            time.sleep(poll)
        waiting = {site for site in asks if _may_yet(answers.get(site))}
        if not waiting or attempts > settings.retries or enough(answers, late):
            unreachable = Answer(Verdict("silent", "it was not reachable"))
            return dict.fromkeys(sorted(away), unreachable) | answers, late, attempts
        while time.monotonic() < end and len(questions.online(waiting, nodes)) < len(waiting):
            time.sleep(poll)


def suffices(answers: Mapping[str, Answer], settings: RunSettings, trained: bool) -> bool:
    """Return whether a round may close with these answers.

    A round of training needs usable updates. The last evaluation needs as many sites that
    measured the state, but for the bad ones that a robust rule bears; none where it decides
    nothing.
    """
    if not trained:
        measured = sum(answer.verdict.status == "ok" for answer in answers.values())
        borne = settings.bad_sites if settings.robust in BOUNDED_RULES else 0
        return settings.gate == "none" or measured >= settings.min_sites - borne
    updates = sum(answer.verdict.update is not None for answer in answers.values())
    return updates_suffice(
        settings.robust, settings.bad_sites, settings.min_sites, updates, refused_here(answers)
    )


def refused_here(answers: Mapping[str, Answer]) -> int:
    """Return how many answers were refused by the gate, and not by their site's own rules."""
    verdicts = [answer.verdict for answer in answers.values()]
    return sum(
        v.status == "refused" and (v.reply is None or v.reply.status == "ok") for v in verdicts
    )


def _may_yet(answer: Answer | None) -> bool:
    """Return whether asking a site again can bring more than it has answered."""
    return answer is None or answer.verdict.status == "failed"


def _late(question: Question, content: RecordDict, judge: Judge) -> LateAnswer:
    ask = question.ask
    answer = judge(question.site, content, ask) if ask else None
    return LateAnswer(question.site, question.round, record_bytes(content), answer)
