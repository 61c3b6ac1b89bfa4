"""What a Dafne server holds: its models, their versions and digests, their metadata."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dafne_federated.core.errors import ServerError, SettingsError, first_fault
from dafne_federated.server.dafne_connection import DafneConnection

_NAME = re.compile(r"[a-zA-Z0-9() -]+")  # Source: the check of the PHP server
_VERSION = re.compile(r"[0-9]{1,12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelVersions:
    """What a server says about one model.

    Attributes:
        name: Of the model.
        kind: Which of Dafne's two servers answers. Only ``php`` takes files in parts and
            canonical versions.
        versions: All versions, oldest first, in seconds since 1970 by the server's clock. The
            ``timestamp_id`` within a file may differ.
        digests: SHA-256 of the file by version, where the server states it.
        size: Bytes of the newest version, if stated.
        unfinished: Names listed as versions that are none: uploads that have not ended.
        metadata: All else, for people.
    """

    name: str
    kind: Literal["php", "fastapi"]
    versions: tuple[int, ...]
    digests: dict[int, str]
    size: int | None
    unfinished: tuple[str, ...]
    metadata: dict[str, Any]

    @property
    def latest(self) -> int:
        """The newest version."""
        return self.versions[-1]

    def holding(self, digest: str) -> int | None:
        """Return the newest version with this digest, or None."""
        return max((v for v, known in self.digests.items() if known == digest), default=None)


class _Info(BaseModel):
    """The answer of ``info_model``; the keys of the model's own metadata are mixed in.

    Both servers write versions as text. An empty table of PHP arrives as a list.
    """

    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=True)

    latest_timestamp: str
    latest_size: int | None = None
    hash: str = ""
    hashes: dict[str, str] = Field(default_factory=dict)
    timestamps: list[str] = Field(default_factory=list)

    @field_validator("hashes", mode="before")
    @classmethod
    def _empty_table(cls, value: Any) -> Any:
        return {} if value == [] else value


def list_models(connection: DafneConnection) -> list[str]:
    """Return the names of the models that the key has access to, sorted.

    Raises:
        ServerError: The server cannot be reached, refuses, or answers something else.
    """
    names = connection.ask("get_available_models").get("models")
    if not isinstance(names, list):
        msg = "get_available_models: expected a list of models in the answer"
        raise ServerError(msg)
    # The FastAPI server lists every file of its folder, its log among them.
    return sorted(n for n in names if isinstance(n, str) and _NAME.fullmatch(n))


def model_versions(connection: DafneConnection, name: str) -> ModelVersions:
    """Return what the server knows of one model.

    Raises:
        SettingsError: No server can hold a model of this name.
        ServerError: As for ``list_models``, or there is no version yet.
    """
    answer = connection.ask("info_model", model_type=checked_name(name))
    try:
        info = _Info.model_validate(answer)
    except ValidationError as error:
        msg = f"info_model: {first_fault(error)}"
        raise ServerError(msg) from None
    listed = {*info.timestamps, *info.hashes, info.latest_timestamp}
    versions = tuple(sorted({int(v) for v in listed if _VERSION.fullmatch(v)}))
    if not versions:
        msg = f"{name}: the server has no version of this model yet"
        raise ServerError(msg)
    # The table wins: the single digest is empty while somebody uploads.
    stated = {info.latest_timestamp: info.hash, **info.hashes}
    return ModelVersions(
        name=name,
        kind="fastapi" if info.latest_size is None else "php",
        versions=versions,
        digests={
            int(v): digest
            for v, digest in stated.items()
            if _VERSION.fullmatch(v) and _DIGEST.fullmatch(digest)
        },
        size=info.latest_size if info.latest_timestamp == str(versions[-1]) else None,
        unfinished=tuple(sorted(v for v in listed if not _VERSION.fullmatch(v))),
        metadata=info.model_extra or {},
    )


def checked_name(name: str) -> str:
    """Return ``name`` if a Dafne server takes it.

    Raises:
        SettingsError: It holds anything but letters, digits, spaces, hyphens and brackets.
    """
    if not _NAME.fullmatch(name):
        msg = (
            f"model: expected letters, digits, spaces, hyphens and round brackets (no "
            f"underscore: Dafne puts the version behind it), got {name!r}"
        )
        raise SettingsError(msg)
    return name
