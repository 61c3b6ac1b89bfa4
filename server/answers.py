"""What a round makes of each answer as soon as it is in: judged, completed, put on disk.

What is kept of an answer is small, so that memory does not grow with the number of sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flwr.app import RecordDict

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.rank_cut import Cut, completed
from dafne_federated.core.run_folder import RoundLine, RunFolder
from dafne_federated.core.wire import RoundReply, RoundRequest, record_bytes
from dafne_federated.strategies.outliers import grown_too_fast, too_large, update_norm
from dafne_federated.strategies.update_gate import Verdict, judge


@dataclass(frozen=True)
class Answer:
    """What is kept of one answer.

    Attributes:
        verdict: What became of it; the state of its update is on disk.
        bytes: Size of its records.
        norm: How far its update moves the base; 0 without one.
        late: Whether its update is one of the round before; see ``late_answers.py``.
        training: What the site said beside its update, in this round or, if late, in the one
            before; None without an update.
    """

    verdict: Verdict
    bytes: int = 0
    norm: float = 0.0
    late: bool = False
    training: RoundReply | None = None


def receive(
    folder: RunFolder,
    site: str,
    content: RecordDict | None,
    request: RoundRequest,
    plan: AdaptationPlan,
    max_cases: int,
    cut: Cut,
) -> Answer:
    """Judge an answer and keep its update.

    Args:
        folder: Where.
        site: Registered name of the site.
        content: The answer, None if its program ended without one.
        request: What was asked.
        plan: The plan of the run.
        max_cases: Largest number of training cases that is believed.
        cut: What the site was sent.
    """
    if content is None:
        return Answer(Verdict("failed", "its program ended without an answer"))
    size = record_bytes(content)
    verdict = judge(site, content, request, plan, max_cases, cut.state)
    if verdict.update is None:
        return Answer(verdict, size)
    arrays = verdict.update.state
    norm = update_norm(plan, arrays)
    if not cut.whole:
        arrays = completed(dict(arrays), cut.rest)
    kept = folder.keep_update(f"{request.round}/{site}", arrays)  # a late one may stand beside it
    update = replace(verdict.update, state=kept)
    return Answer(replace(verdict, update=update), size, norm, training=verdict.reply)


def lacked(plan: AdaptationPlan, answer: Answer) -> tuple[str, ...]:
    """Return the labels that a site says nobody annotated there, by name.

    With an update, what came with it counts, which for a late one is not what came last.
    """
    reply = answer.training or (answer.verdict.reply if answer.verdict.status == "ok" else None)
    missing = (reply.missing if reply else None) or ()
    return tuple(plan.labels[channel - 1] for channel in missing)


def with_same_labels(
    answers: Mapping[str, Answer], plan: AdaptationPlan, lines: list[RoundLine]
) -> dict[str, Answer]:
    """Return the answers with updates refused whose site lacked other labels before.

    What a site annotated is one thing throughout a run; else its updates of different rounds
    would be about different labels.

    Args:
        answers: By site.
        plan: The plan of the run.
        lines: The rounds before.
    """
    before = {
        name: own.lacks
        for line in lines
        for name, own in line.sites.items()
        if line.trained and own.training_cases
    }
    checked = dict(answers)
    for site, answer in answers.items():
        now = lacked(plan, answer)
        if answer.verdict.update is not None and now != (then := before.get(site, now)):
            reason = (
                f"its labels: expected it to lack {list(then)} as before, got {list(now)}; it must "
                "go back to them, or a new run be started"
            )
            verdict = Verdict("refused", reason, answer.verdict.reply)
            checked[site] = replace(answer, verdict=verdict, late=False)
    return checked


def without_outliers(
    answers: Mapping[str, Answer], known: float, lines: list[RoundLine], ratio: float
) -> dict[str, Answer]:
    """Return the answers with updates refused that are out of all proportion.

    Args:
        answers: By site.
        known: Norm of the state that sites were sent.
        lines: The rounds before, with the norms of the sites' earlier updates.
        ratio: How many times the median of the round, or the largest so far of the same site
            and of what it was sent, an update may be.
    """
    norms = {site: answer.norm for site, answer in answers.items() if answer.verdict.update}
    before = dict.fromkeys(norms, known)
    for line in lines:
        for site in norms.keys() & line.sites.keys():
            before[site] = max(before[site], line.sites[site].update_norm)
    reasons = grown_too_fast(norms, before, ratio) | too_large(norms, ratio)
    return dict(answers) | {
        site: replace(
            answers[site],
            verdict=Verdict("refused", reason, answers[site].verdict.reply),
            late=False,
        )
        for site, reason in reasons.items()
    }
