"""Whether two sides may work together: their versions, looked at before anything else.

The versions travel in the first message and in its answer, and are read there apart from the
rest, so that sides whose other fields differ can still say why they do not work together.
Reading them loads neither TensorFlow nor a base.

What must be the same, and how far:

* the protocol and this package: exactly, for they say what messages mean and what training does;
* Flower, Keras and TensorFlow: their first two numbers, for what comes after those are repairs.

Other packages and Python may differ; results then agree within the last bits.
"""

from functools import cache

from flwr.app import RecordDict

from dafne_federated.core.versions import installed, software_version
from dafne_federated.core.wire import PROTOCOL

_NAMES = {
    "protocol": "protocol",
    "software": "dafne-federated",
    "flower": "Flower",
    "keras": "Keras",
    "tensorflow": "TensorFlow",
}
_EXACT = frozenset({"protocol", "software"})
_PACKAGES = {
    "flower": ("flwr",),
    "keras": ("keras",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
}
_NOT_SAID = "not said"


@cache
def own_versions() -> dict[str, str]:
    """Return the versions of this side, as the fields of ``Offer`` and ``OfferReply``.

    ``protocol`` is not among them: every message has it.
    """
    return {"software": software_version()} | {
        field: installed(*packages) for field, packages in _PACKAGES.items()
    }


def versions_said(content: RecordDict) -> dict[str, str] | None:
    """Return the versions that an offer or its answer names; None if it is no message of ours.

    Whatever else it holds is left alone.
    """
    record = content.config_records.get("message")
    if record is None or "protocol" not in record:
        return None
    return {field: str(record.get(field, _NOT_SAID))[:40] for field in _NAMES}


def difference(site: dict[str, str], coordinator: dict[str, str]) -> str:
    """Return in words which versions differ that must not, and what to do; empty if none.

    Args:
        site: Versions of the site, see ``with_protocol``.
        coordinator: Those of the coordinator.
    """
    wrong = [
        f"{name} {site[field]} at this site and {coordinator[field]} at the coordinator"
        for field, name in _NAMES.items()
        if _what_counts(field, site[field]) != _what_counts(field, coordinator[field])
    ]
    if not wrong:
        return ""
    return f"versions differ: {', '.join(wrong)}; install those of the coordinator at this site"


def with_protocol(versions: dict[str, str]) -> dict[str, str]:
    """Return versions of this side together with its protocol."""
    return {"protocol": str(PROTOCOL)} | versions


def fingerprint() -> str:
    """Return what of this side's versions counts, as text that can be part of a file's name."""
    own = with_protocol(own_versions())
    return "-".join(_what_counts(field, own[field]).replace(" ", "") for field in _NAMES)


def _what_counts(field: str, value: str) -> str:
    return value if field in _EXACT else ".".join(value.split(".")[:2])
