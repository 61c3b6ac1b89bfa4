"""Download a version of a model: checked by its digest, kept by it, and continued after a break."""

import contextlib
import hashlib
import re
import shutil
import tempfile
from pathlib import Path

import httpx

from dafne_federated.core.approvals import home_folder
from dafne_federated.core.errors import ServerError
from dafne_federated.server.dafne_connection import (
    DafneConnection,
    NoAnswerError,
    RefusedError,
    Told,
)
from dafne_federated.server.dafne_server import ModelVersions


def pull(
    connection: DafneConnection,
    model: ModelVersions,
    version: int | None = None,
    cache: Path | None = None,
    told: Told | None = None,
) -> Path:
    """Return a file with the bytes of a version, from the cache if they are there.

    The file is named by its digest and is compared with it each time. What arrived before a
    break stays in a neighbouring file; the rest is asked for, and a server that cannot send a
    rest sends all of it.

    Args:
        connection: To the server.
        model: What it says of the model.
        version: Seconds since 1970; by default the newest.
        cache: Folder for downloaded models; by default that of the person who runs this.
        told: Called with the bytes so far and their total, which is 0 where it is not known.

    Raises:
        ServerError: There is no such version, no digest of it, or its bytes are not those of
            the digest, twice.
    """
    version = model.latest if version is None else version
    if version not in model.versions:
        known = ", ".join(map(str, model.versions[-5:]))
        msg = f"{model.name}: expected one of the versions {known}, got {version}"
        raise ServerError(msg)
    digest = model.digests.get(version)
    if digest is None:
        msg = f"{model.name}: the server states no SHA-256 of version {version}; not downloaded"
        raise ServerError(msg)
    folder = cache or home_folder() / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{digest}.model", folder / f"{digest}.part"
    if path.exists() and file_digest(path) == digest:
        return path
    for _ in range(2):  # a partial file may be damaged itself: the second time there is none
        connection.again(lambda: _fetch(connection, model.name, version, digest, partial, told))
        got = file_digest(partial)
        if got == digest:
            partial.replace(path)
            return path
        partial.unlink()
    msg = (
        f"{model.name}: version {version} arrived damaged twice: expected SHA-256 {digest[:16]}, "
        f"got {got[:16]}; the file on the server, or the digest beside it, is not right"
    )
    raise ServerError(msg)


def copy_model(source: Path, target: Path) -> None:
    """Copy a file so that ``target`` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        shutil.copyfile(source, copied := Path(folder) / "copy")
        copied.replace(target)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(
    connection: DafneConnection,
    name: str,
    version: int,
    digest: str,
    partial: Path,
    told: Told | None,
) -> None:
    """Complete ``partial``, as far as this attempt gets."""
    there = partial.stat().st_size if partial.exists() else 0
    if there and file_digest(partial) == digest:
        return
    fields = {"model_type": name, "timestamp": str(version)}  # a number is answered with 500
    try:
        with connection.receive("get_model", there, **fields) as response:
            stated = response.headers.get("X-SHA256-Checksum", digest)
            if stated.lower() != digest:
                msg = (
                    f"{name}: the server states two digests of version {version}: {digest[:16]} "
                    f"and {stated[:16]}; its model.json may hold an old one"
                )
                raise ServerError(msg)
            first = _starts_at(response, there)
            _write(response, partial, first, told)
    except RefusedError as error:
        if error.status != 416:
            raise
        partial.unlink()  # longer than the file on the server
        msg = f"{name}: the rest of version {version} cannot be had; all of it is asked for"
        raise NoAnswerError(msg, unsent=True) from None


def _starts_at(response: httpx.Response, asked: int) -> int:
    """Return where the bytes of the answer belong: at ``asked``, or at the start."""
    if response.status_code != 206:
        return 0
    told = re.match(r"bytes ([0-9]+)-", response.headers.get("Content-Range", ""))
    return asked if told and int(told[1]) == asked else -1


def _write(response: httpx.Response, partial: Path, first: int, told: Told | None) -> None:
    if first < 0:
        msg = "get_model: the server sent another piece of the file than was asked for"
        raise ServerError(msg)
    total = 0
    with contextlib.suppress(KeyError, ValueError):
        total = first + int(response.headers["Content-Length"])
    with partial.open("r+b" if first else "wb") as file:
        file.seek(first)
        for block in response.iter_raw():  # as they come: what arrived is kept
            file.write(block)
            if told is not None:
                told(file.tell(), total)
