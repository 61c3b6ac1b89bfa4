"""Flower's `flower-supernode`, which loses no answer to a bad network.

An answer goes up in pieces. Where a piece arrives and the connection breaks before the node hears
of it, the node sends it again, the coordinator says that it does not want it, and Flower 1.41 then
drops the whole answer, which may be an hour of training. Here the answer is announced again: the
coordinator says which pieces it still lacks, and gets those. Once somebody there waits for the
answer it lacks none of an answer that is announced anew; the rest then goes as it was announced
before.

Flower also takes any answer for that to the message it has just fetched. Where one of a run that
is over turned up late, each answer from then on waited for the next message. Here the node waits
for the right one.

It replaces one name in a module of Flower 1.41 that is not public; a test watches over it.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from dafne_federated.client.flower_parts import replace_parts

REPLACED = "_push_messages"
_ATTEMPTS = 8  # at one piece
_LONGEST_PAUSE = 10.0  # seconds between two of them

Announce = Callable[[Any, Any, float], tuple[set[str], str]]
Push = Callable[[int, str, str, bytes], None]


class Announcement:
    """One answer after the other, each announced again where a piece of it is not wanted.

    Args:
        announce: Flower's: tells of a message and its pieces; returns which are wanted, and the
            number under which.
        push: Flower's: sends a piece, and raises ``ObjectPushError`` if it is not wanted.
    """

    def __init__(self, announce: Announce, push: Push) -> None:
        self._announce, self._push = announce, push
        self._again: Callable[[], tuple[set[str], str]] | None = None
        self._session = ""
        self._lock = threading.Lock()

    def announce(self, message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        """Tell of a message; stands where Flower does."""
        self._again = partial(self._announce, message, tree, seconds)
        wanted, self._session = self._again()
        return wanted, self._session

    def push(self, run: int, _session: str, piece: str, content: bytes) -> None:
        """Send a piece, or find that it is there; Flower calls this from several threads.

        Raises:
            ObjectPushError: It was never wanted, though it is not there.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(ObjectPushError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(max=_LONGEST_PAUSE),
            reraise=True,
        )
        for attempt in retrying:
            with attempt:
                session = self._session
                try:
                    self._push(run, session, piece, content)
                except ObjectPushError:
                    if self._is_there(session, piece):
                        return
                    raise

    def _is_there(self, session: str, piece: str) -> bool:
        """Announce again and return whether a piece is not wanted because it has arrived."""
        with self._lock:
            if self._session != session:  # another thread did so meanwhile
                return False
            assert self._again is not None
            wanted, session = self._again()
            if wanted:
                self._session = session
            return piece not in wanted


def main() -> None:
    """Do what Flower's own program does, but hold on to answers.

    Raises:
        RunError: This version of Flower is another one.
    """
    import flwr.supernode.start_client_internal as flower
    from flwr.supernode.cli import flower_supernode

    def push_answers(state: Any, object_store: Any, send: Announce, push_object: Push) -> None:
        held = Announcement(send, push_object)
        push_messages = theirs[REPLACED]
        push_all(state, lambda: push_messages(state, object_store, held.announce, held.push))

    theirs = replace_parts(flower, "node", **{REPLACED: push_answers})
    flower_supernode()


def push_all(state: Any, push: Callable[[], None]) -> None:
    """Push answers until that to the message that was fetched last is among them.

    Args:
        state: Flower's: messages and answers by number, a message until its answer is pushed.
        push: Flower's: waits for any answer, and pushes all there are.
    """
    with state.lock_msg_store:
        known = state.msg_store.items()
        fetched = [n for n, entry in known if not entry.message.metadata.reply_to_message_id]
    push()
    while fetched and fetched[-1] in state.msg_store:
        push()


if __name__ == "__main__":
    main()
