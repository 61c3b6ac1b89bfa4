"""Which models this machine may execute: a list of digests that its people approved."""

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from dafne_federated.core.errors import ApprovalError, SettingsError
from dafne_federated.core.files import locked, write_atomic
from dafne_federated.core.model_file import ModelFile


class Approvals:
    """The approved models of one machine or site, kept in a JSON file.

    A `.model` file holds program text that runs when the model is used. Only a model whose
    digest is listed here is ever executed.

    Args:
        path: The file; it need not exist yet. By default that of the person who runs this.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home_folder() / "approved-models.json"

    def entries(self) -> dict[str, dict[str, str]]:
        """Return what is known of each approved model, by digest.

        Raises:
            SettingsError: The file is not the JSON that this class writes.
        """
        if not self.path.exists():
            return {}
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            msg = f"{self.path}: the list of approved models cannot be read: {error}"
            raise SettingsError(msg) from None
        if not isinstance(entries, dict):
            msg = f"{self.path}: expected a JSON object of approved models"
            raise SettingsError(msg)
        return entries

    def allows(self, digest: str) -> bool:
        """Return whether the model with this digest may be executed here."""
        return digest in self.entries()

    def add(self, model: ModelFile, why: str) -> None:
        """Approve ``model``; ``why`` is kept for whoever reads the list later."""
        with self._changed_by_one() as entries:
            entries[model.digest] = {
                "name": str(model.metadata.get("model_name", "")),
                "sources": model.sources_digest,
                "why": why,
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
            }

    def remove(self, digest: str) -> bool:
        """Take an approval back; return whether there was one."""
        with self._changed_by_one() as entries:
            return entries.pop(digest, None) is not None

    def require(self, model: ModelFile) -> None:
        """Refuse a model that is not approved.

        Raises:
            ApprovalError: Nobody approved this digest here.
        """
        if not self.allows(model.digest):
            name = model.metadata.get("model_name") or "this model"
            msg = (
                f"{name} holds program text that would run on this machine, and nobody here has "
                f"approved it; look at it with 'dafne-federated inspect FILE' and then run "
                f"'dafne-federated approve FILE' (digest {model.digest[:16]})"
            )
            raise ApprovalError(msg)

    @contextlib.contextmanager
    def _changed_by_one(self) -> Iterator[dict[str, dict[str, str]]]:
        """Give the entries to be changed, to one process at a time; then write them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            entries = self.entries()
            before = json.dumps(entries, indent=2, sort_keys=True)
            yield entries
            after = json.dumps(entries, indent=2, sort_keys=True)
            if after != before:
                write_atomic(self.path, after.encode())


def home_folder() -> Path:
    """Return the folder for what this person approved and cached.

    The environment variable DAFNE_FEDERATED_HOME overrides the usual place of the system.
    """
    chosen = os.environ.get("DAFNE_FEDERATED_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("dafne-federated"))
