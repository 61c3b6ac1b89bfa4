"""Run a federation in this process: the same ServerApp and ClientApp, no sockets, no leftovers.

Flower offers no supported way to do this, so this file uses names of Flower 1.41 that are not
public: the identity that ``Message`` reads, and the message id that a transport sets.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from dafne_federated.client.app import app as client_app
from dafne_federated.server.app import app as server_app

_SERVER = 1  # Flower's own node id of a server
_CRASHED = 2  # Flower's error code for an exception in a ClientApp


Handle = Callable[[Message, Context], Message]


def run_inline(run: Path, sites: int, app: Handle = client_app) -> None:
    """Run the federation in the folder ``run`` with its first ``sites`` sites, one by one.

    Args:
        run: The folder.
        sites: How many.
        app: What handles a message at a site: the ClientApp, or what goes around it.

    Raises:
        DafneFederatedError: What the server raises: too few sites or usable updates.
    """
    config = {"run": str(run.resolve())}
    grid = InlineGrid(app, sites, config)
    server_app(grid, _context(_SERVER, {}, config))


class InlineGrid(Grid):
    """A Grid whose nodes are calls of a ClientApp in this process.

    A message is handled when its answer is first asked for, so answers come in one by one and
    whoever watches sees progress. Content is copied on the way: server and sites never share
    an object.

    Args:
        app: What handles a message at a site.
        sites: Number of nodes; node n gets partition-id n.
        run_config: What Flower hands to every app of a run.
    """

    def __init__(self, app: Handle, sites: int, run_config: Mapping[str, Any]) -> None:
        self._app = app
        self._contexts = {
            100 + n: _context(100 + n, {"partition-id": n, "num-partitions": sites}, run_config)
            for n in range(sites)
        }
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, _SERVER, 1

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """Refuse: nothing here needs Flower's description of a run."""
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes; they are always online."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages and return their ids."""
        identities = []
        for message in messages:
            identity = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = identity
            self._waiting[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the first of these messages that waits, and return its answer."""
        for identity in message_ids:
            if (message := self._waiting.pop(identity, None)) is not None:
                return [self._handle(message)]
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return all answers."""
        identities = list(self.push_messages(messages))
        return [reply for _ in identities for reply in self.pull_messages(identities)]

    def _handle(self, message: Message) -> Message:
        incoming = copy.deepcopy(message)
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(incoming, context)
        except Exception as error:  # as Flower's own runtime answers for a crashed ClientApp
            reply = Message(Error(_CRASHED, type(error).__name__), reply_to=incoming)
        return copy.deepcopy(reply)


def _context(node: int, node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Context:
    return Context(
        run_id=1,
        node_id=node,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )
