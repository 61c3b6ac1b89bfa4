"""Messages to sites that are still without an answer, over all rounds of this process.

Flower keeps a message until its time to live is over, so an answer may come long after its
round. Here it is known for what it is. A process that starts again knows nothing of the messages
of the one before; their answers are never fetched.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from dafne_federated.core.rank_cut import Cut
from dafne_federated.core.wire import EVALUATE_STATE, TRAIN_ROUND, RoundRequest
from dafne_federated.server.lost_messages import LostMessages

# A message outlives its round and the next one, where its answer is a late one, by so many seconds.
_LONGER = 600.0


@dataclass(frozen=True)
class Ask:
    """What one site is asked in a round.

    Attributes:
        request: The typed half.
        content: All records of the message.
        cut: The state in it, and what it lacks.
    """

    request: RoundRequest
    content: RecordDict
    cut: Cut

    @property
    def trains(self) -> bool:
        """Whether an update is expected."""
        return self.request.epochs > 0


@dataclass(frozen=True)
class Question:
    """One message.

    Attributes:
        site: Name of the site.
        round: The round.
        ask: What was asked; None where an answer would not be used any more.
        expires: When the transport forgets it, on the monotonic clock.
    """

    site: str
    round: int
    ask: Ask | None
    expires: float


class Questions:
    """What was asked and not answered.

    Args:
        grid: Flower's connection to the sites.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, Question] = {}
        self._lost = LostMessages(grid)

    def ask(self, asks: Mapping[str, Ask], nodes: Mapping[str, int], wait: float) -> None:
        """Send each site its message.

        Args:
            asks: By site.
            nodes: Flower's node id by site.
            wait: Longest wait for the answer, in seconds.
        """
        names, ttl = sorted(asks), 2 * wait + _LONGER
        self._lost.asked([nodes[name] for name in names])
        messages = [
            Message(
                asks[name].content,
                nodes[name],
                TRAIN_ROUND if asks[name].trains else EVALUATE_STATE,
                ttl=ttl,
                group_id=str(asks[name].request.round),
            )
            for name in names
        ]
        expires = time.monotonic() + ttl
        for identity, name in zip(self._grid.push_messages(messages), names, strict=True):
            ask = asks[name]
            self._open[identity] = Question(name, ask.request.round, ask, expires)

    def answers(self) -> list[tuple[Question, RecordDict | int]]:
        """Return what has come in; Flower's number of the error where the transport reports one.

        An error's own text may hold anything of the site, so it is not kept.
        """
        found: list[tuple[Question, RecordDict | int]] = []
        for reply in list(self._grid.pull_messages(sorted(self._open))):
            question = self._open.pop(reply.metadata.reply_to_message_id, None)
            if question is not None:
                found.append((question, reply.error.code if reply.has_error() else reply.content))
        return found

    def waits_for(self, site: str, number: int) -> bool:
        """Return whether a message of a round to a site is without an answer."""
        return any((q.site, q.round) == (site, number) for q in self._open.values())

    def lost(self, sites: Collection[str], nodes: Mapping[str, int]) -> list[str]:
        """Return those of the sites that lost what they were asked last, or their answer."""
        vain = self._lost.of([nodes[site] for site in sites])
        return sorted(site for site in sites if nodes[site] in vain)

    def online(self, sites: Collection[str], nodes: Mapping[str, int]) -> list[str]:
        """Return those of the sites that are online."""
        online = self._lost.online([nodes[site] for site in sites])
        return sorted(site for site in sites if nodes[site] in online)

    def forget(self, site: str, number: int) -> None:
        """Expect nothing more of a site in a round."""
        self._keep({i: q for i, q in self._open.items() if (q.site, q.round) != (site, number)})

    def age(self, oldest: int) -> None:
        """Let go of states that were sent before round ``oldest``, and of expired messages."""
        now = time.monotonic()
        self._keep(
            {
                identity: q if q.round >= oldest else Question(q.site, q.round, None, q.expires)
                for identity, q in self._open.items()
                if q.expires > now
            }
        )

    def _keep(self, questions: dict[str, Question]) -> None:
        self._open = questions
