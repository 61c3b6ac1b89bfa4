"""Put a model on a Dafne server: as the next canonical version, or as a contribution.

What the two servers need, and why, is in ``docs/dafne-server.md``.
"""

import time
from dataclasses import dataclass

from dafne_federated.core.errors import ServerError, VersionMovedError
from dafne_federated.core.files import sha256
from dafne_federated.server.dafne_connection import DafneConnection, Told
from dafne_federated.server.dafne_server import ModelVersions, model_versions
from dafne_federated.server.dafne_upload import PART_BYTES, Upload, send_file

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
            "would be lost; nothing was published. Pull it, run again from it, pass the gate "
            "again, then push"
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
    upload = Upload("upload_merged_model", name, data, {"sha256": digest}, part_bytes)

    def unmoved() -> None:
        require_base_newest(model_versions(connection, name), base_digest)

    def arrived() -> int | None:
        now = model_versions(connection, name)
        there = now.holding(digest)
        return there if there is not None and there > base else None

    answer = send_file(connection, upload, unmoved, arrived, told)
    time.sleep(pause)  # an overwriting upload would come within this second
    now = model_versions(connection, name)
    version = now.holding(digest)
    if version is None or version <= base:
        msg = (
            f"{name}: version {answer.get('timestamp', '(not said)')} on the server is not what "
            "was sent: somebody uploaded in the same second, or its model.json holds versions or "
            "digests that hide the true ones. Look at the versions before anybody uses it"
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
    digest = sha256(data)
    # "hash" is what Dafne's client sends, "original_hash" what the servers compare.
    fields = {"dice": f"{dice:.6f}", "hash": digest, "original_hash": digest}

    upload = Upload("upload_model", name, data, fields, part_bytes)

    def unmoved() -> None:
        require_base_newest(model_versions(connection, name), base_digest)

    send_file(connection, upload, unmoved, None, told)
    time.sleep(pause)


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
