"""Bases that a site's people decide on: what waits, what it is, and the decision."""

from dataclasses import dataclass
from pathlib import Path

from dafne_federated.client.inbox import Inbox
from dafne_federated.client.site_cache import SiteCache
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import ModelFileError, SettingsError
from dafne_federated.core.files import sha256
from dafne_federated.core.model_file import ModelFile, model_labels, parse_model
from dafne_federated.core.source_changes import SourceChanges, source_changes

_SHORTEST = 8  # hexadecimal digits of a digest that somebody types


@dataclass(frozen=True)
class BaseReview:
    """What people are shown of a base; nothing of it was executed.

    Attributes:
        digest: SHA-256 of its bytes.
        model: Its content; None if it cannot be read.
        why_not: Why it cannot be read, or empty.
        name: What it calls itself.
        author: Who it says made it, or empty.
        labels: What it segments.
        changes: Its program beside those approved before.
        approved: The entry in the list of approvals, or None.
    """

    digest: str
    model: ModelFile | None = None
    why_not: str = ""
    name: str = ""
    author: str = ""
    labels: tuple[str, ...] = ()
    changes: SourceChanges | None = None
    approved: dict[str, str] | None = None


def waiting_bases(settings: SiteSettings) -> list[BaseReview]:
    """Return what waits for a decision, the newest first."""
    if settings.inbox is None:
        return []
    inbox = Inbox(settings.inbox)
    return [
        review_base(settings, inbox.bytes(digest))
        for digest in inbox.digests()
        if inbox.has(digest)
    ]


def review_base(settings: SiteSettings, data: bytes) -> BaseReview:
    """Return what is known of a base from its bytes."""
    digest = sha256(data)
    try:
        model = parse_model(data)
    except ModelFileError as error:
        return BaseReview(digest, why_not=str(error))
    info = model.metadata.get("info")
    author = info.get("Author") if isinstance(info, dict) else None
    others = [known for known in approved_models(settings) if known.digest != digest]
    return BaseReview(
        digest,
        model,
        name=str(model.metadata.get("model_name") or ""),
        author=str(author or ""),
        labels=tuple((model_labels(model) or {}).values()),
        changes=source_changes(model, others),
        approved=Approvals(settings.approvals).entries().get(digest),
    )


def approved_models(settings: SiteSettings) -> list[ModelFile]:
    """Return the approved bases whose bytes are at this site."""
    cache, found = SiteCache(settings.cache), []
    for digest in sorted(Approvals(settings.approvals).entries()):
        if cache.has_base(digest):
            found.append(cache.base(digest))
    return found


def find_base(settings: SiteSettings, what: str) -> bytes:
    """Return the bytes of a base: a file, or one that waits, by the start of its digest.

    Raises:
        SettingsError: There is none, or more than one.
    """
    if Path(what).is_file():
        return Path(what).read_bytes()
    if settings.inbox is None:
        msg = f"{what}: no such file, and this site has no inbox"
        raise SettingsError(msg)
    inbox = Inbox(settings.inbox)
    return inbox.bytes(_one(what, inbox.digests(), "that waits"))


def approve_base(settings: SiteSettings, data: bytes, why: str) -> ModelFile:
    """Allow a base to run at this site, and keep its bytes for that.

    Raises:
        ModelFileError: It cannot be read.
    """
    model = parse_model(data)
    SiteCache(settings.cache).keep_base(data)
    Approvals(settings.approvals).add(model, why)
    if settings.inbox is not None:
        Inbox(settings.inbox).remove(model.digest)
    return model


def withdraw_base(settings: SiteSettings, what: str) -> str:
    """Take an approval back, by the start of its digest; from the next message on it counts.

    Returns:
        The whole digest.

    Raises:
        SettingsError: There is none, or more than one.
    """
    approvals = Approvals(settings.approvals)
    digest = _one(what, list(approvals.entries()), "that is approved")
    approvals.remove(digest)
    return digest


def _one(start: str, digests: list[str], kind: str) -> str:
    found = [digest for digest in digests if digest.startswith(start.lower())]
    if len(start) < _SHORTEST or len(found) != 1:
        known = ", ".join(sorted(digest[:16] for digest in digests)) or "none"
        msg = f"expected a file, or {_SHORTEST} digits or more of the digest of one base {kind}"
        raise SettingsError(f"{msg} ({known}), got {start!r}")
    return found[0]
