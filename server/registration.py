"""Which sites may take part: their names and keys, at the coordinator.

Flower knows a site by its key and by the name that was given here; that name stands in all
records, and a site that says another one is refused.
"""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import locked, write_atomic
from dafne_federated.core.flower_command import CONNECTION, flwr
from dafne_federated.core.site_request import SiteRequest
from dafne_federated.core.wire import SiteName
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.flower_nodes import flower_nodes


class RegisteredSite(BaseModel):
    """One registration; a site that changes its key has several.

    Attributes:
        name: The site's name.
        node: Number that Flower gave it.
        public_key: Its key.
        registered: When, as ISO 8601.
        revoked: When it was taken back; empty while it counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SiteName
    node: int
    public_key: str
    registered: str
    revoked: str = ""

    @property
    def fingerprint(self) -> str:
        """See ``SiteRequest``."""
        return SiteRequest(name=self.name, public_key=self.public_key).fingerprint


_SITES = TypeAdapter(list[RegisteredSite])


def registered_sites(folder: ServerFolder) -> list[RegisteredSite]:
    """Return all registrations, revoked ones too, the oldest first.

    Raises:
        SettingsError: The file with them is damaged.
    """
    try:
        return _SITES.validate_json(folder.sites.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError as error:
        msg = f"{folder.sites}: damaged: {error.errors()[0]['msg']}"
        raise SettingsError(msg) from None


def register(folder: ServerFolder, name: str, request: SiteRequest) -> RegisteredSite:
    """Let a site take part.

    Args:
        folder: The coordinator, which must be running.
        name: Its name, as agreed with its people.
        request: What they sent.

    Raises:
        SettingsError: The request is of another site, or name or key are registered already.
        RunError: Flower refused it.
    """
    if request.name != name:
        msg = f"the request is of site {request.name!r}, expected {name!r}"
        raise SettingsError(msg)
    with locked(folder.sites_lock):
        sites = registered_sites(folder)
        if any(site.name == name and not site.revoked for site in sites):
            msg = f"a site {name!r} is registered already; revoke it first to give it a new key"
            raise SettingsError(msg)
        if any(site.public_key == request.public_key for site in sites):
            msg = "this key was registered before; the site has to make a new one"
            raise SettingsError(msg)
        site = RegisteredSite(
            name=name,
            node=_node(folder, name, request, {site.node for site in sites}),
            public_key=request.public_key,
            registered=_now(),
        )
        _keep(folder, [*sites, site])
        return site


def revoke(folder: ServerFolder, name: str) -> RegisteredSite:
    """Let a site take part no more; its programs are sent away within a minute.

    Its key can never be registered again.

    Raises:
        SettingsError: No such site is registered.
        RunError: Flower refused it.
    """
    with locked(folder.sites_lock):
        sites = registered_sites(folder)
        for number, site in enumerate(sites):
            if site.name == name and not site.revoked:
                if any(node.number == site.node for node in flower_nodes(folder)):
                    _supernode(folder, "unregister", str(site.node), CONNECTION)
                sites[number] = site.model_copy(update={"revoked": _now()})
                _keep(folder, sites)
                return sites[number]
    known = sorted({site.name for site in sites if not site.revoked})
    msg = f"expected one of the registered sites {known}, got {name!r}"
    raise SettingsError(msg)


def site_states(folder: ServerFolder) -> dict[str, str]:
    """Return by name of each registered site what Flower says of it, such as ``online``.

    Raises:
        RunError: The coordinator does not run.
    """
    listed = {node.number: node.state for node in flower_nodes(folder)}
    sites = [site for site in registered_sites(folder) if not site.revoked]
    return {site.name: listed.get(site.node, "unknown") for site in sites}


def _node(folder: ServerFolder, name: str, request: SiteRequest, ours: set[int]) -> int:
    """Return Flower's number of a site that we do not know yet.

    Where an earlier call was killed before it could write down what it had registered, Flower
    knows the site already; what it knows under this name with another key is taken back.
    """
    for node in flower_nodes(folder):
        if node.number in ours or node.name != name:
            continue
        if node.public_key == request.public_key:
            return node.number
        _supernode(folder, "unregister", str(node.number), CONNECTION)
    with tempfile.TemporaryDirectory(dir=folder.home) as scratch:
        file = Path(scratch) / "key.pub"
        file.write_text(request.public_key, encoding="utf-8")
        answer = _supernode(folder, "register", str(file), CONNECTION, "--name", name)
    return int(answer["node-id"])


def _supernode(folder: ServerFolder, *arguments: str) -> dict[str, Any]:
    return flwr(["supernode", *arguments], folder.environment, folder.home)


def _keep(folder: ServerFolder, sites: list[RegisteredSite]) -> None:
    write_atomic(folder.sites, _SITES.dump_json(sites, indent=2), private=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
