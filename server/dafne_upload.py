"""One file on its way to a Dafne server: in parts, each tried several times, and continued."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dafne_federated.core.errors import ServerError
from dafne_federated.core.files import sha256
from dafne_federated.server.dafne_connection import (
    DafneConnection,
    NoAnswerError,
    RefusedError,
    Told,
)
from dafne_federated.server.upload_progress import UploadProgress, acknowledged, forget, keep

log = logging.getLogger(__name__)

PART_BYTES = 50 * 2**20  # Source: UPLOAD_CHUNK_SIZE of dafne_dl's RemoteModelProvider


@dataclass(frozen=True)
class Upload:
    """What is sent where.

    Attributes:
        route: Name of the service.
        name: Of the model on the server.
        data: The whole file.
        fields: What the service needs beside the file.
        part_bytes: A larger file travels in parts of this size.
    """

    route: str
    name: str
    data: bytes = field(repr=False)
    fields: Mapping[str, str]
    part_bytes: int = PART_BYTES

    @property
    def parts(self) -> int:
        """Number of parts, at least 1."""
        return max(-(-len(self.data) // self.part_bytes), 1)

    def part(self, index: int) -> bytes:
        """Return the bytes of one part."""
        return self.data[index * self.part_bytes : (index + 1) * self.part_bytes]


def send_file(
    connection: DafneConnection,
    upload: Upload,
    before_last: Callable[[], None],
    arrived: Callable[[], int | None] | None,
    told: Told | None = None,
) -> dict[str, Any]:
    """Send what the server does not have yet, and return its last answer.

    The last part is the one that counts: with it the server puts the file together and shows it
    to everybody. Before it nothing has changed for anybody.

    Args:
        connection: To the server.
        upload: What to send.
        before_last: Called before the last part; it raises where that must not be sent.
        arrived: Called after an answer to the last part was lost; returns the version under
            which the file is on the server, or None. Without it such a part is not sent again.
        told: Called with the bytes sent so far and their total.

    Raises:
        ServerError: The server refuses or does not answer.
    """
    progress = UploadProgress(
        address=connection.address,
        route=upload.route,
        model=upload.name,
        digest=sha256(upload.data),
        part_bytes=upload.part_bytes,
    )
    first = min(acknowledged(progress), upload.parts - 1)
    try:
        answer = _send_from(first, connection, upload, progress, before_last, arrived, told)
    except RefusedError as error:
        forget(progress)
        # The server may have cleared away the parts of the upload that was continued.
        if not first or error.status not in (400, 422, 500):
            raise
        log.info("%s; all parts are sent again", error)
        answer = _send_from(0, connection, upload, progress, before_last, arrived, told)
    forget(progress)
    return answer


def _send_from(
    first: int,
    connection: DafneConnection,
    upload: Upload,
    progress: UploadProgress,
    before_last: Callable[[], None],
    arrived: Callable[[], int | None] | None,
    told: Told | None,
) -> dict[str, Any]:
    def send(index: int) -> dict[str, Any]:
        return _send_part(connection, upload, progress.digest, index, told)

    for index in range(first, upload.parts - 1):
        connection.again(lambda number=index: send(number))  # type: ignore[misc]
        keep(progress, index + 1)
    before_last()
    doubtful = False

    def there() -> dict[str, Any] | None:
        version = arrived() if doubtful and arrived is not None else None
        return None if version is None else {"timestamp": version}

    def last() -> dict[str, Any]:
        nonlocal doubtful
        if (answer := there()) is not None:
            return answer
        try:
            return send(upload.parts - 1)
        except RefusedError:
            # It was putting the parts together when it was asked, and now they are used up.
            if (answer := there()) is not None:
                return answer
            raise
        except NoAnswerError as error:
            if not error.unsent and arrived is None:
                msg = (
                    f"{error}; the server may have the whole contribution or not: ask who "
                    "merges there before it is sent again"
                )
                raise ServerError(msg) from None
            doubtful = True
            raise

    return connection.again(last)


def _send_part(
    connection: DafneConnection, upload: Upload, digest: str, index: int, told: Told | None
) -> dict[str, Any]:
    # Not "*.model": the server would list the folder of the parts as its newest version.
    file_name = f"{digest[:32]}.part"
    fields = {"model_type": upload.name, **upload.fields}
    if upload.parts > 1:
        fields["chunk_index"] = str(index)
        fields["total_chunks"] = str(upload.parts)
        fields["filename"] = file_name

    def told_part(sent: int, _: int) -> None:
        if told is not None:
            told(index * upload.part_bytes + sent, len(upload.data))

    return connection.send(upload.route, upload.part(index), file_name, told_part, **fields)
