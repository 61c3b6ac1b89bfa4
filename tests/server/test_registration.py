"""A site is registered once, under the name and with the key that its own people gave."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.site_request import SiteRequest
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.registration import (
    RegisteredSite,
    register,
    registered_sites,
    revoke,
)


def request(name: str) -> SiteRequest:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return SiteRequest(name=name, public_key=key.public_bytes(*openssh).decode())


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    """A coordinator, not running, that once knew the clinic and now knows the hospital."""
    made = ServerFolder(tmp_path)
    sites = [
        RegisteredSite(
            name=name, node=number, public_key=request(name).public_key, registered="2026-01-01",
            revoked=revoked,
        )
        for number, (name, revoked) in enumerate([("clinic", "2026-02-01"), ("hospital", "")])
    ]  # fmt: skip
    made.sites.write_text(f"[{','.join(site.model_dump_json() for site in sites)}]")
    return made


def test_a_request_under_another_name_is_refused(folder: ServerFolder) -> None:
    with pytest.raises(SettingsError, match="of site 'clinic', expected 'hospital'"):
        register(folder, "hospital", request("clinic"))


def test_a_name_and_a_key_are_registered_once(folder: ServerFolder) -> None:
    with pytest.raises(SettingsError, match="a site 'hospital' is registered already"):
        register(folder, "hospital", request("hospital"))
    old = registered_sites(folder)[0]
    with pytest.raises(SettingsError, match="key was registered before"):
        register(folder, "clinic", SiteRequest(name="clinic", public_key=old.public_key))


def test_only_who_is_registered_can_be_revoked(folder: ServerFolder) -> None:
    for name in ("clinic", "nobody"):
        with pytest.raises(SettingsError, match=r"registered sites \['hospital'\]"):
            revoke(folder, name)


def test_a_damaged_list_is_named(folder: ServerFolder) -> None:
    folder.sites.write_text("[{}]")
    with pytest.raises(SettingsError, match=r"sites\.json: damaged: Field required"):
        registered_sites(folder)
    folder.sites.unlink()
    assert registered_sites(folder) == []
