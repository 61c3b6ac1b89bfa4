"""Which nodes lost what they were asked, or what they answered, so that nothing will come.

Flower's SuperLink counts a message as delivered once it handed it out, and the SuperNode keeps
it in memory alone: where a connection breaks at that moment, or the program of a site ends later,
nobody hears of it. There are two signs:

1. The node came online after it was asked; the SuperLink notes when.
2. A node does one thing after the other, and sends an answer before it fetches the next message.
   So a small question, sent a while later, is answered only when the first one is done with; if
   its answer is there and the first one's is not, that one was lost. The small questions are sent
   at growing distances, so that even long work sees few of them.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from dafne_federated.core.wire import QUERY_ALIVE

LOOK = 5.0  # seconds between two looks
FIRST = 15.0  # seconds from what was asked to the first small question
LONGER = 8.0  # the next one comes so many times later; each delays what is asked next by a second


@dataclass
class _Asked:
    """What is known of one node since it was asked something.

    Attributes:
        online: When it had come online, in the SuperLink's words.
        pause: Seconds from the question to the next small one.
        at: When it was asked, on the monotonic clock.
        small: Small questions without an answer.
        answered: Whether one of them was answered.
    """

    online: str
    pause: float
    at: float = field(default_factory=time.monotonic)
    small: set[str] = field(default_factory=set)
    answered: bool = False


class LostMessages:
    """Which nodes are to be asked again.

    Args:
        grid: Flower's connection to the sites.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._asked: dict[int, _Asked] = {}

    def asked(self, nodes: Collection[int]) -> None:
        """Note that nodes are asked something now."""
        online = self._online()
        self._asked |= {node: _Asked(online.get(node, ""), FIRST) for node in nodes}

    def of(self, nodes: Collection[int]) -> set[int]:
        """Return those of these nodes that lost the message, or its answer; sends small questions.

        To be called again and again, with a look for answers in front of each call, with the
        nodes whose answer is still missing. An answer that comes while this runs is not taken for
        a lost one: a small question that is answered now counts from the next call on.
        """
        online = self._online()
        there = {node: self._asked[node] for node in nodes if node in online}
        found = {n for n, asked in there.items() if asked.answered or asked.online != online[n]}
        small = {identity: asked for asked in there.values() for identity in asked.small}
        for reply in list(self._grid.pull_messages(sorted(small))) if small else []:
            identity = reply.metadata.reply_to_message_id
            small[identity].small.discard(identity)
            away = reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
            small[identity].answered |= not away
        now = time.monotonic()
        due = [node for node, asked in there.items() if now > asked.at + asked.pause]
        messages = [Message(RecordDict({}), node, QUERY_ALIVE, ttl=3600.0) for node in due]
        sent = self._grid.push_messages(messages) if messages else []
        for node, identity in zip(due, sent, strict=True):
            there[node].small.add(identity)
            there[node].pause *= LONGER
        return found

    def online(self, nodes: Collection[int]) -> set[int]:
        """Return those of these nodes that are online."""
        return set(nodes) & self._online().keys()

    def _online(self) -> dict[int, str]:
        return {n.node_id: getattr(n, "last_activated_at", "") for n in self._grid.get_nodes()}
