"""Send messages to sites and collect what comes back before a deadline."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from dafne_federated.server.lost_messages import LOOK, LostMessages

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
    retries: int = 0,
) -> dict[str, Kept]:
    """Send each site its message and return what is kept of the answers that came in time.

    A site that lost its message, or whose answer was lost, is asked again.

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
        retries: So many times a site is asked again, once it is online, after such an error. If
            any, one that was offline for a while is asked again however often that happens.

    Returns:
        What was kept, by site. Sites that did not answer in time are not in it.
    """
    asked: dict[str, str] = {}
    lost = LostMessages(grid)
    end = time.monotonic() + deadline
    left = dict.fromkeys(contents, retries)
    kept: dict[str, Kept] = {}

    def ask(names: Iterable[str]) -> None:
        chosen = sorted(names)
        lost.asked([nodes[name] for name in chosen])
        messages = [
            Message(contents[name], nodes[name], message_type, ttl=deadline + 600.0, group_id=group)
            for name in chosen
        ]
        asked.update(zip(grid.push_messages(messages), chosen, strict=True))

    ask(contents)
    failed: set[str] = set()
    away: set[str] = set()  # those of them that were only offline
    look = time.monotonic() + LOOK
    while asked or failed:
        found = list(grid.pull_messages(sorted(asked))) if asked else []
        for reply in found:
            site = asked.pop(reply.metadata.reply_to_message_id, None)
            if site is None or site in kept:
                continue
            # An error's own text may hold anything of the site, so it is not kept.
            offline = reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
            if offline and retries > 0:
                failed.add(site)
                away.add(site)
                continue
            if reply.has_error() and left[site] > 0:
                left[site] -= 1
                failed.add(site)
                continue
            kept[site] = take(site, None if reply.has_error() else reply.content)
            failed.discard(site)
            asked = {identity: name for identity, name in asked.items() if name != site}
        now = time.monotonic()
        if (asked or failed) and now > end:
            break
        if found:
            continue
        if failed or now > look:
            look = now + LOOK
            online = lost.online([nodes[name] for name in failed])
            again = {name for name in failed if nodes[name] in online}
            vain = lost.of([nodes[name] for name in asked.values()])
            again |= {name for name in asked.values() if nodes[name] in vain}
            failed -= again
            away -= again
            if again:
                ask(again)
        if asked or failed:
            time.sleep(poll)
    return kept | {site: take(site, None) for site in sorted(failed - away)}


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
