"""An answer of which a piece went astray is announced again, and arrives whole."""

import inspect
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import flwr.supernode.start_client_internal as flower
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from dafne_federated.client import node
from dafne_federated.client.node import REPLACED, Announcement, push_all


def test_flower_sends_answers_by_the_name_that_is_replaced() -> None:
    source = inspect.getsource(flower.start_client_internal)
    assert source.count(f"{REPLACED}(") == 1
    assert list(inspect.signature(getattr(flower, REPLACED)).parameters) == [
        *("state", "object_store", "send", "push_object")
    ]
    inside = inspect.getsource(getattr(flower, REPLACED))
    assert "ids_obj_to_send, session_id = send(message, object_tree, clientapp_runtime)" in inside
    assert "partial(push_object, run_id, session_id)" in inside


def test_an_answer_that_turns_up_late_is_not_taken_for_that_to_the_last_message() -> None:
    state = InMemoryNodeState(InMemoryObjectStore())
    sent: list[str] = []
    ready = [["old"], ["mine"]]

    def entry(answers: str = "") -> Any:
        return SimpleNamespace(
            message=SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=answers))
        )

    state.msg_store |= {"stuck": entry(), "late answer": entry("gone"), "mine": entry()}

    def push() -> None:
        for number in ready.pop(0):
            sent.append(number)
            state.msg_store.pop(number, None)

    push_all(state, push)
    assert (sent, ready) == (["old", "mine"], [])
    state.msg_store.clear()
    ready.append(["error"])  # of a message that Flower refused itself
    push_all(state, push)
    assert sent[-1] == "error"


class Coordinator:
    """Keeps pieces as Flower's does; the answer to some of what is sent is lost on the way.

    Once ``awaited``, a known answer that is announced again is as one that nobody asked for.
    """

    def __init__(self, pieces: set[str], loses: float, seed: int = 0, awaited: bool = False):
        self.pieces, self.loses, self.chance = pieces, loses, random.Random(seed)
        self.awaited = awaited
        self.stored: dict[str, bytes] = {}
        self.session, self.wanted = 0, set[str]()

    def announce(self, message: str, tree: str, seconds: float) -> tuple[set[str], str]:
        assert (message, tree, seconds) == ("answer", "tree", 1.0)
        if self.session and self.awaited:
            return set(), "nothing"
        self.session += 1
        self.wanted = self.pieces - self.stored.keys()
        return set(self.wanted), str(self.session)

    def push(self, run: int, session: str, piece: str, content: bytes) -> None:
        """As Flower's connection, which sends again where the network broke."""
        lost = True
        while lost:
            if session != str(self.session) or piece not in self.wanted:
                raise ObjectPushError(piece, run, session)
            self.wanted.discard(piece)
            self.stored[piece] = content
            lost = self.chance.random() < self.loses


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_piece_arrives_once_and_whole(
    seed: int, awaited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_LONGEST_PAUSE", 0.01)
    contents = {f"piece-{number}": bytes([number]) for number in range(40)}
    coordinator = Coordinator(set(contents), loses=0.3, seed=seed, awaited=awaited)
    held = Announcement(coordinator.announce, coordinator.push)
    wanted, session = held.announce("answer", "tree", 1.0)
    with ThreadPoolExecutor(4) as threads:
        sent = [threads.submit(held.push, 1, session, piece, contents[piece]) for piece in wanted]
        for one in sent:
            one.result()
    assert coordinator.stored == contents


def test_a_piece_that_nobody_ever_wants_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_LONGEST_PAUSE", 0.01)

    def never(run: int, session: str, piece: str, _content: bytes) -> None:
        raise ObjectPushError(piece, run, session)

    held = Announcement(Coordinator({"piece"}, loses=0.0).announce, never)
    _, session = held.announce("answer", "tree", 1.0)
    with pytest.raises(ObjectPushError):
        held.push(1, session, "piece", b"")
