"""Answers that come after their round has closed: dropped, or used in the next round.

With ``late`` ``drop``, the default, the result of a round depends on nothing but the answers that
it closed with. With ``use``, the update of round t is taken into round t + 1 if its site has given
none there: it did not answer, its program failed, or it was not asked to train. The gate judges it
against the request of round t, the state that was sent then and its rank, and it counts with the
cases of its site as any other; as every update it is a whole state, and no difference to one, so
its weight pulls the mean back towards the round before. It counts for ``min_sites``, too. The mean
stays what each strategy makes it: with ``factors`` there are more cross terms, those of two rounds;
with ``alternating`` the factor that stands still is another one in the round before, so late
updates are refused there (``core/strategy_table.py``).

What is waiting is known to the process that asked. After a restart it is lost, so that a run with
``use`` that is stopped between two such rounds may end in other bits; with ``drop`` it does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dafne_federated.server.answers import Answer
from dafne_federated.strategies.update_gate import Verdict


@dataclass(frozen=True)
class LateAnswer:
    """An answer to a round before the one that runs.

    Attributes:
        site: Name of the site.
        round: The round that it answers.
        bytes: Size of its records.
        answer: What the gate made of it; None where it is not to be used.
    """

    site: str
    round: int
    bytes: int
    answer: Answer | None = None


def with_late(
    answers: Mapping[str, Answer], late: list[LateAnswer], number: int
) -> dict[str, Answer]:
    """Return the answers of round ``number`` with late updates where a site gave none.

    Args:
        answers: By site.
        late: What came of earlier rounds.
        number: The round that runs.
    """
    result = dict(answers)
    for item in late:
        own = result[item.site]
        if item.answer is None or item.round != number - 1 or own.verdict.update is not None:
            continue
        update = item.answer.verdict.update
        if update is None or own.verdict.status == "refused":
            continue
        said = f"{own.verdict.reason}; " if own.verdict.reason else ""
        reason = f"{said}its update of round {item.round} came late and is used"
        verdict = Verdict("ok", reason, own.verdict.reply, update)
        result[item.site] = replace(
            own, verdict=verdict, norm=item.answer.norm, late=True, training=item.answer.training
        )
    return result
