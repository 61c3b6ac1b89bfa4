"""Which parts of an upload a Dafne server has acknowledged: what a killed upload goes on from."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dafne_federated.core.approvals import home_folder
from dafne_federated.core.files import write_atomic


class UploadProgress(BaseModel):
    """One upload in parts.

    A server keeps parts under a name that the client chooses, and says nothing of which it has.
    The name follows from the digest, so another process goes on with the same parts.

    Attributes:
        address: Of the server.
        route: Name of the service.
        model: Name of the model on the server.
        digest: SHA-256 of the whole file.
        part_bytes: Size of all parts but the last.
        sent: Parts that were acknowledged, from the first on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    route: str
    model: str
    digest: str
    part_bytes: int
    sent: int = 0


def acknowledged(upload: UploadProgress, folder: Path | None = None) -> int:
    """Return how many parts of this very upload the server has."""
    try:
        kept = UploadProgress.model_validate_json(_path(upload, folder).read_bytes())
    except (OSError, ValidationError):
        return 0
    return kept.sent if kept.model_copy(update={"sent": upload.sent}) == upload else 0


def keep(upload: UploadProgress, sent: int, folder: Path | None = None) -> None:
    """Remember that the server has the first ``sent`` parts."""
    text = upload.model_copy(update={"sent": sent}).model_dump_json()
    write_atomic(_path(upload, folder), text.encode())


def forget(upload: UploadProgress, folder: Path | None = None) -> None:
    """Remember nothing of this upload: it has ended, or begins anew."""
    _path(upload, folder).unlink(missing_ok=True)


def _path(upload: UploadProgress, folder: Path | None) -> Path:
    return (folder or home_folder() / "uploads") / f"{upload.digest}.json"
