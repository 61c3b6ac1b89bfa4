"""Put a model on a Dafne server: as the next canonical version, or as a contribution.

What the two servers need, and why, is in ``docs/dafne-server.md``.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dafne_federated.core.errors import ServerError, VersionMovedError
from dafne_federated.core.files import sha256
from dafne_federated.server.dafne_connection import (
    DafneConnection,
    NoAnswerError,
    RefusedError,
    Told,
)
from dafne_federated.server.dafne_server import ModelVersions, model_versions
from dafne_federated.server.upload_progress import UploadProgress, acknowledged, forget, keep

log = logging.getLogger(__name__)

PART_BYTES = 50 * 2**20  # Source: UPLOAD_CHUNK_SIZE of dafne_dl's RemoteModelProvider
# A server names what it gets by its clock in whole seconds; equal names overwrite each other.
PAUSE = 1.1
_LONGEST_WAIT = 10  # seconds that the newest version may lie ahead of the server's clock


@dataclass(frozen=True)
class Published:
    """A canonical version as it lies on the server.

    Attributes:
        name: Of the model.
        version: Its number, in seconds since 1970 by the server's clock.
        digest: SHA-256 that the server states for it.
        beside: Versions that others published at the same time; nothing of them is in this one.
    """

    name: str
    version: int
    digest: str
    beside: tuple[int, ...]


def require_base_newest(model: ModelVersions, base_digest: str) -> int:
    """Return the newest version if it is the base, by its digest.

    Raises:
        VersionMovedError: The newest version is another one.
        ServerError: Somebody is uploading, so the newest version is not known.
    """
    if model.unfinished:
        msg = (
            f"{model.name}: an upload on the server has not ended ({model.unfinished[0]}); try "
            "again later, or ask its administrator to remove what was left behind"
        )
        raise ServerError(msg)
    if model.digests.get(model.latest) == base_digest:
        return model.latest
    base = model.holding(base_digest)
    if base is None:
        msg = (
            f"{model.name}: the server has no version with the digest of the base "
            f"({base_digest[:16]}); its newest is {model.latest}. Pull that, adapt it, and push "
            "the result"
        )
    else:
        msg = (
            f"{model.name}: version {model.latest} was published after the base ({base}), and "
            "would be lost; nothing was sent. Pull it, run again from it, pass the gate again, "
            "then push"
        )
    raise VersionMovedError(msg, base, model.latest)


def publish(
    connection: DafneConnection,
    name: str,
    data: bytes,
    base_digest: str,
    told: Told | None = None,
    part_bytes: int = PART_BYTES,
    pause: float = PAUSE,
) -> Published:
    """Make ``data`` the next canonical version of a model, and compare it with what arrived.

    Safe to call again after any failure: what is there already is not sent twice.

    Args:
        connection: With a key that has the merge permission of this model.
        name: Of the model on the server.
        data: Bytes of the ``.model`` file.
        base_digest: SHA-256 of the version it follows, which must still be the newest.
        told: Called with the bytes sent so far and their total.
        part_bytes: Larger files travel in parts of this size.
        pause: Seconds after which the server's clock has moved on.

    Raises:
        VersionMovedError: The newest version is not the base; nothing was published.
        ServerError: The server refuses, cannot do this, or holds something else afterwards.
    """
    digest = sha256(data)
    model = model_versions(connection, name)
    if model.digests.get(model.latest) == digest:
        return Published(name, model.latest, digest, ())
    base = require_base_newest(model, base_digest)
    if model.kind != "php":
        msg = (
            f"{name}: this server takes contributions only, no canonical versions "
            "(it is Dafne's older one)"
        )
        raise ServerError(msg)
    _wait_for_next_second(connection, model, pause)
    upload = _Upload(connection, "upload_merged_model", name, data, told, part_bytes)

    def unmoved() -> None:
        require_base_newest(model_versions(connection, name), base_digest)

    def arrived() -> int | None:
        now = model_versions(connection, name)
        there = now.holding(digest)
        return there if there is not None and there > base else None

    answer = upload.run({"sha256": digest}, before_last=unmoved, arrived=arrived)
    time.sleep(pause)  # an overwriting upload would come within this second
    now = model_versions(connection, name)
    version = now.holding(digest)
    if version is None or version <= base:
        msg = (
            f"{name}: version {answer.get('timestamp', '(not said)')} on the server is not what "
            "was sent; somebody may have uploaded in the same second. Look at the versions "
            "before anybody uses it"
        )
        raise ServerError(msg)
    beside = tuple(v for v in now.versions if v > base and v != version)
    return Published(name, version, digest, beside)


def contribute(
    connection: DafneConnection,
    name: str,
    data: bytes,
    base_digest: str,
    dice: float = -1.0,
    told: Told | None = None,
    part_bytes: int = PART_BYTES,
    pause: float = PAUSE,
) -> None:
    """Send ``data`` as a user's contribution; the server's own merge takes half of it.

    The server compares the digest of what arrived; only who may merge sees the file afterwards.

    Args:
        connection: With a key that has access to this model.
        name: Of the model on the server.
        data: Bytes of the ``.model`` file.
        base_digest: SHA-256 of the version it follows, which must still be the newest.
        dice: Mean Dice that was measured, 0 to 1; -1 for none, as Dafne's own client says it.
        told: Called with the bytes sent so far and their total.
        part_bytes: Larger files travel in parts of this size, where the server can.
        pause: Seconds after which the server's clock has moved on.

    Raises:
        VersionMovedError: The newest version is not the base; nothing was sent.
        ServerError: The server refuses, or reports that something else arrived.
    """
    model = model_versions(connection, name)
    require_base_newest(model, base_digest)
    if model.kind != "php":
        part_bytes = max(len(data), 1)  # it takes each part for a whole model
    upload = _Upload(connection, "upload_model", name, data, told, part_bytes)
    digest = sha256(data)
    # "hash" is what Dafne's client sends, "original_hash" what the servers compare.
    fields = {"dice": f"{dice:.6f}", "hash": digest, "original_hash": digest}

    def unmoved() -> None:
        require_base_newest(model_versions(connection, name), base_digest)

    upload.run(fields, before_last=unmoved, arrived=None)
    time.sleep(pause)


class _Upload:
    """One file on its way in parts, each tried several times."""

    def __init__(
        self,
        connection: DafneConnection,
        route: str,
        name: str,
        data: bytes,
        told: Told | None,
        part_bytes: int,
    ) -> None:
        self.connection, self.name, self.data, self.told = connection, name, data, told
        self.progress = UploadProgress(
            address=connection.address,
            route=route,
            model=name,
            digest=sha256(data),
            part_bytes=part_bytes,
        )
        # Not "*.model": the server would list the folder of the parts as its newest version.
        self.file_name = f"{self.progress.digest[:32]}.part"
        self.total = max(-(-len(data) // part_bytes), 1)

    def run(
        self,
        fields: dict[str, str],
        before_last: Callable[[], None],
        arrived: Callable[[], int | None] | None,
    ) -> dict[str, Any]:
        """Send what the server does not have yet and return its last answer."""
        first = min(acknowledged(self.progress), self.total - 1)
        try:
            answer = self._from(first, fields, before_last, arrived)
        except RefusedError as error:
            # The server may have cleared away the parts of the upload that is continued.
            if not first or error.status not in (400, 422, 500):
                forget(self.progress)
                raise
            log.info("%s; all parts are sent again", error)
            forget(self.progress)
            answer = self._from(0, fields, before_last, arrived)
        forget(self.progress)
        return answer

    def _from(
        self,
        first: int,
        fields: dict[str, str],
        before_last: Callable[[], None],
        arrived: Callable[[], int | None] | None,
    ) -> dict[str, Any]:
        for index in range(first, self.total - 1):
            self.connection.again(lambda index=index: self._send(index, fields))  # type: ignore[misc]
            keep(self.progress, index + 1)
        before_last()
        doubtful = False

        def last() -> dict[str, Any]:
            nonlocal doubtful
            if doubtful and arrived is not None and (version := arrived()) is not None:
                return {"timestamp": version}
            try:
                return self._send(self.total - 1, fields)
            except NoAnswerError as error:
                if not error.unsent and arrived is None:
                    msg = (
                        f"{error}; the server may have the whole contribution or not: ask who "
                        "merges there before it is sent again"
                    )
                    raise ServerError(msg) from None
                doubtful = True
                raise

        return self.connection.again(last)

    def _send(self, index: int, fields: dict[str, str]) -> dict[str, Any]:
        size = self.progress.part_bytes
        part = self.data[index * size : (index + 1) * size]
        if self.total > 1:
            fields = {
                **fields,
                "chunk_index": str(index),
                "total_chunks": str(self.total),
                "filename": self.file_name,
            }

        def told(sent: int, _: int) -> None:
            if self.told is not None:
                self.told(index * size + sent, len(self.data))

        return self.connection.send(
            self.progress.route, part, self.file_name, told, model_type=self.name, **fields
        )


def _wait_for_next_second(connection: DafneConnection, model: ModelVersions, pause: float) -> None:
    """Return when the server's clock is past the newest version.

    Raises:
        ServerError: The newest version lies so far ahead that a new one would sort before it.
    """
    ahead = model.latest - (connection.clock or int(time.time()))
    if ahead > _LONGEST_WAIT:
        msg = (
            f"{model.name}: version {model.latest} lies {ahead} s ahead of the server's clock; a "
            "new version would not become the newest. Its administrator has to rename that one"
        )
        raise ServerError(msg)
    time.sleep(max(ahead + 1, 0) * pause)
