"""A federation that goes on: sites announce new cases, and the model gets its next version.

A *generation* (``generation.py``) has one base and one plan. Its *versions* are runs as any
other: the same rounds, gate, release, checkpoints and report. Over and over the server

1. asks every site how many new cases it has since the run that it trained in last; a site
   says none while they are fewer than its own people want (``least-new-cases``), and a site that
   never trained has only new ones;
2. once ``min-sites`` sites announce some, makes the next version and lets these sites train
   ``rounds`` rounds from the state of the last release, while all measure; whoever trained
   before stands in the mean with that state, the less the longer ago (``continuation.py``);
3. compares the result with what all measured of the state that it started from, and of the base
   of the generation: however many versions there are, what they lose together stays within one
   margin. What passes both is released and the next version starts from it; what does not is left
   behind.

A process that was killed goes on with the version that was under way, after its last finished
round; between two versions there is nothing to lose. A version that cannot go on, because its
sites are gone, is dropped after some looks. It begins again once sites announce other cases, or
leave and come again; so does one that came to its end without anybody judging it.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.serverapp import Grid

from dafne_federated.core.errors import DafneFederatedError, MessageError, RunError
from dafne_federated.core.news import QUERY_NEWS, NewsReply, NewsRequest
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.wire import plain
from dafne_federated.server.continuation import continuation
from dafne_federated.server.exchange import exchange
from dafne_federated.server.generation import (
    add_version,
    counts,
    drop_version,
    generation_info,
    is_closed,
    last_trained,
    trained_cases,
    versions,
)
from dafne_federated.server.membership import Members, gather
from dafne_federated.server.release import release
from dafne_federated.server.rounds import first_state, run_rounds

log = logging.getLogger(__name__)

_LOOKS = 3  # at a version that cannot go on


@dataclass
class _Seen:
    """What one look leaves for the next one of the same process."""

    nodes: frozenset[int] = frozenset()
    members: Members | None = None
    told: dict[str, int] = field(default_factory=dict)
    # What was announced for a version that came to nothing.
    vain: dict[str, int] = field(default_factory=dict)


def run_generation(
    grid: Grid,
    folder: RunFolder,
    last: int | None = None,
    pause: Callable[[float], None] = time.sleep,
    key: Path | None = None,
) -> None:
    """Make versions of the generation in ``folder`` until the process is ended.

    Args:
        grid: Flower's connection to the sites.
        folder: The generation.
        last: Return once so many versions have come to their end; by default never.
        pause: Waits so many seconds.
        key: Signs the releases.
    """
    every, seen, failed = generation_info(folder).every, _Seen(), 0
    while last is None or sum(map(is_closed, versions(folder))) < last:
        under_way = next((v for v in versions(folder) if not is_closed(v)), None)
        try:
            version = under_way or _next_version(grid, folder, seen)
            if version is not None:
                _finish(grid, folder, version, key)
                failed = 0
                if not counts(version):
                    seen.vain = _announced(version)
                continue
        except RunError as error:
            log.warning("no version: %s", error)
            folder.event("no version", reason=str(error))
            failed = failed + 1 if under_way else 1
            if under_way and failed >= _LOOKS:
                folder.event("version dropped", version=_number(under_way))
                seen.vain = _announced(under_way)
                drop_version(under_way)
        pause(every)


def ask_news(grid: Grid, folder: RunFolder, members: Members) -> dict[str, int]:
    """Return how many new cases sites announce, by name; a site without any is not in it."""
    info, since = folder.info(), last_trained(folder)
    contents = {
        name: NewsRequest(base_digest=info.base_digest, since=since.get(name)).to_record()
        for name in sorted(members.nodes)
    }
    replies = exchange(
        grid, contents, members.nodes, QUERY_NEWS, "0", info.settings.deadline,
        lambda _, content: content,
    )  # fmt: skip
    found: dict[str, int] = {}
    for name, content in sorted(replies.items()):
        if content is None:
            continue
        try:
            reply = NewsReply.from_record(content)
            if (reply.site, reply.base_digest) != (name, info.base_digest):
                msg = f"expected the news of {name!r} about this base, got others"
                raise MessageError(msg)
        except DafneFederatedError as error:
            log.warning("news of %s: %s", name, plain(error))
            continue
        if reply.status == "ok" and reply.new_cases:
            found[name] = reply.new_cases
    return found


def _next_version(grid: Grid, folder: RunFolder, seen: _Seen) -> RunFolder | None:
    """Ask the sites, and make the next version if enough of them have new cases."""
    info, plan = folder.info(), folder.plan()
    nodes = frozenset(grid.get_node_ids())
    if nodes != seen.nodes:
        seen.vain = {}
    if seen.members is None or nodes != seen.nodes or seen.members.declined:
        seen.members, seen.nodes = gather(grid, folder, info, plan, seen.members), nodes
    found = ask_news(grid, folder, seen.members)
    if found != seen.told:
        seen.told = found
        folder.event("new cases", sites=found)
    if len(found) < info.settings.min_sites or found == seen.vain:
        return None
    version = add_version(folder, first_state(info, plan), found)
    folder.event("version begun", version=_number(version), sites=found)
    return version


def _finish(grid: Grid, folder: RunFolder, version: RunFolder, key: Path | None) -> None:
    """Run what is left of a version, and release it if it may be."""
    run_rounds(grid, version)
    result = release(version, key)
    used = trained_cases(version)
    folder.event(
        "version finished",
        version=_number(version),
        released=result.released,
        reason=result.reason,
        sites=used,
    )
    log.info("version %d: %s", _number(version), result.reason)


def _announced(version: RunFolder) -> dict[str, int]:
    record = continuation(version)
    return record.new_cases if record else {}


def _number(version: RunFolder) -> int:
    record = continuation(version)
    return record.version if record else 0
