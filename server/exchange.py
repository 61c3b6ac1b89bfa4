"""Send messages to sites and collect what comes back before a deadline."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

Replies = dict[str, RecordDict | None]
Kept = TypeVar("Kept")


def exchange(
    grid: Grid,
    contents: Mapping[str, RecordDict],
    nodes: Mapping[str, int],
    message_type: str,
    group: str,
    deadline: float,
    take: Callable[[str, RecordDict | None], Kept],
    poll: float = 0.5,
) -> dict[str, Kept]:
    """Send each site its message and return what is kept of the answers that came in time.

    Args:
        grid: Flower's connection to the sites.
        contents: What each site gets, by site name.
        nodes: Flower's node id by site name.
        message_type: Flower's routing label.
        group: Flower's group id, the round.
        deadline: Longest wait in seconds.
        take: Called with the site's name and its answer as soon as it is in, None where the
            transport reported an error (a lost node, a crashed program); returns what to keep
            of it, so that answers need not stand in memory together.
        poll: Pause between two looks, in seconds.

    Returns:
        What was kept, by site. Sites that did not answer in time are not in it.
    """
    names = sorted(contents)
    messages = [
        Message(contents[name], nodes[name], message_type, ttl=deadline + 600.0, group_id=group)
        for name in names
    ]
    sent = dict(zip(grid.push_messages(messages), names, strict=True))
    pending, end = set(sent), time.monotonic() + deadline
    kept: dict[str, Kept] = {}
    while pending:
        found = list(grid.pull_messages(sorted(pending)))
        for reply in found:
            identity = reply.metadata.reply_to_message_id
            if identity in pending:
                pending.discard(identity)
                # An error's own text may hold anything of the site, so it is not kept.
                site = sent[identity]
                kept[site] = take(site, None if reply.has_error() else reply.content)
        if pending and time.monotonic() > end:
            break
        if pending and not found:
            time.sleep(poll)
    return kept


def wait_for_nodes(grid: Grid, least: int, wait: float, poll: float = 1.0) -> list[int]:
    """Return the nodes that are online, once there are ``least`` of them or time is up.

    One more look is taken after the first success, so that sites that connect together are
    seen together.
    """
    end = time.monotonic() + wait
    before: list[int] = []
    while True:
        nodes = sorted(grid.get_node_ids())
        if (len(nodes) >= least and nodes == before) or time.monotonic() > end:
            return nodes
        before = nodes
        time.sleep(poll if len(nodes) < least else min(poll, 0.2))
