"""What is put on record of a round: what each site did, and why a round could not be used."""

from collections.abc import Mapping

from dafne_federated.core.errors import RunError
from dafne_federated.core.paired_changes import told
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.wire import RoundReply, record_bytes
from dafne_federated.server.answers import Answer, lacked
from dafne_federated.server.federation import Federation
from dafne_federated.server.late_answers import LateAnswer
from dafne_federated.server.quorum import refused_here
from dafne_federated.server.round_asks import RoundAsks


def site_rounds(
    run: Federation,
    number: int,
    asks: RoundAsks,
    answers: Mapping[str, Answer],
    late: list[LateAnswer],
) -> dict[str, SiteRound]:
    """Return what each site did in round ``number``, by name.

    What joining cost is counted with the first round after it.
    """
    first, members = number == run.joined, run.members
    return {
        site: _site_round(
            run.plan,
            answer,
            asks.by_site[site].request.states,
            asked=not asks.trains or site in asks.training,
            down=record_bytes(asks.by_site[site].content)
            + (members.bytes_down[site] if first else 0),
            up=answer.bytes
            + sum(item.bytes for item in late if item.site == site)
            + (members.bytes_up[site] if first else 0),
        )
        for site, answer in answers.items()
    }


def too_few(
    number: int, settings: RunSettings, answers: Mapping[str, Answer], trained: bool
) -> RunError:
    """Return the error that ends a run in a round with too few usable answers."""
    reasons = "; ".join(
        f"{site}: {answer.verdict.reason}"
        for site, answer in answers.items()
        if answer.verdict.reason
    )
    if trained:
        what, got = "updates", sum(a.verdict.update is not None for a in answers.values())
    else:
        what = "sites that measure the last state"
        got = sum(answer.verdict.status == "ok" for answer in answers.values())
    msg = f"round {number}: expected {settings.min_sites} {what}, got {got}; {reasons}"
    if trained and got + refused_here(answers) >= settings.min_sites:
        msg += f"; robust {settings.robust!r} cannot bear {settings.bad_sites} bad sites with these"
    return RunError(f"{msg}; started again, the run goes on with this round")


def _site_round(
    plan: AdaptationPlan, answer: Answer, states: int, asked: bool, down: int, up: int
) -> SiteRound:
    fields: dict[str, object] = {}
    verdict = answer.verdict
    if (reply := verdict.reply) is not None and reply.status == "ok":
        # The Dice is of what was sent, and counts whatever became of the update.
        fields = _measured(plan, reply, states)
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


def _measured(plan: AdaptationPlan, reply: RoundReply, states: int) -> dict[str, object]:
    rows = list(zip(plan.labels, reply.dice, reply.dice_cases, strict=False))
    sums = (reply.change_persons, reply.change_total, reply.change_squares)
    (choose, accept), *more = told(plan.labels, *sums, states)
    choose_base, accept_base = more[0] if more else ({}, {})
    return {
        "dice": {label: value if count else None for label, value, count in rows},
        "dice_cases": {label: count for label, _, count in rows},
        "choose": choose,
        "accept": accept,
        "choose_base": choose_base,
        "accept_base": accept_base,
    }
