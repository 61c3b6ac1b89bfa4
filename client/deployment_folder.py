"""The folder of a site: its settings, its key, its approvals and its cache.

site.toml           settings, for people to edit: data, limits, the coordinator's address
coordinator.crt     what the coordinator is known by
keys/               the site's private key, and a secret between Flower's programs
NAME.request.json   what the coordinator needs to register the site
approved-models.json  bases that may run here
cache/              bases, prepared slices (images of patients) and features
privacy-marker.json how much the ledger in the cache must hold, once noise was given
inbox/              bases that came and that nobody approved yet; never executed
refusals.log        what was not run here, and why
flower/, logs/      Flower's own settings, and what the programs said
"""

import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dafne_federated.client.first_settings import first_settings
from dafne_federated.client.site_settings import SiteSettings, read_site
from dafne_federated.core.dashed import DASHED
from dafne_federated.core.dataset import open_folder
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import private_folder, write_atomic
from dafne_federated.core.site_request import SiteRequest
from dafne_federated.core.toml_file import checked, read_toml
from dafne_federated.core.wire import SiteName

_NAME = TypeAdapter(SiteName)


class Connection(BaseModel):
    """How a site reaches the coordinator.

    Attributes:
        coordinator: ``HOST:PORT`` of the coordinator.
        local_port: First of three ports of this machine alone: Flower's SuperNode, and the
            health of it and of the program that starts the work.
    """

    model_config = DASHED

    coordinator: str = Field(pattern=r"^[A-Za-z0-9.:\[\]_-]+:[0-9]{1,5}$")
    local_port: int = Field(default=9094, ge=1, le=65533)


class _Connected(BaseModel):
    """What of ``site.toml`` is read here."""

    model_config = ConfigDict(frozen=True)

    connection: Connection


class SiteFolder:
    """Where things are in the folder of a site; see the head of this file."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.settings_file = self.path / "site.toml"
        self.coordinator = self.path / "coordinator.crt"
        self.key = self.path / "keys" / "site.key"
        self.secret = self.path / "keys" / "superexec.secret"
        self.refusals = self.path / "refusals.log"
        self.home = self.path / "flower"
        self.logs = self.path / "logs"
        self.lock = self.path / "lock"

    @property
    def settings(self) -> SiteSettings:
        """What ``site.toml`` says of data and limits; see ``connection`` for errors."""
        return read_site(self.settings_file)

    @property
    def connection(self) -> Connection:
        """What ``site.toml`` says of the coordinator.

        Raises:
            SettingsError: This is no folder of a site, or a setting is wrong.
        """
        missing = "not found; make it with 'dafne-federated site init'"
        values = read_toml(self.settings_file, missing)
        return checked(_Connected, values, self.settings_file).connection

    def request_file(self, name: str) -> Path:
        """Return where the request of the site with this name lies."""
        return self.path / f"{name}.request.json"


def make_site(
    path: Path, name: str, connection: Connection, authority: Path, data: Path
) -> SiteFolder:
    """Make the folder of a site, or what is missing in one; nothing is replaced.

    Persons of the data folder are dealt to training and validation once; the names then stand
    in the settings, where people can change them.

    Args:
        path: The folder.
        name: Name of the site, as agreed with the coordinator.
        connection: How it reaches the coordinator.
        authority: The certificate that the coordinator gave.
        data: Folder with images and masks.

    Raises:
        SettingsError: What is there does not fit what is asked for, or ``authority`` is none.
        DataError: The data folder cannot be used.
    """
    folder = SiteFolder(path)
    if '"' in str(folder.path) or "'" in str(folder.path):
        msg = f"expected a folder without quotes in its name, got {str(folder.path)!r}"
        raise SettingsError(msg)
    try:
        _NAME.validate_python(name)
    except ValidationError:
        msg = f"name: expected letters, digits, spaces, '.', '_' and '-', at most 64, got {name!r}"
        raise SettingsError(msg) from None
    certificate = _certificate(authority)
    new = not folder.settings_file.exists()
    first = (
        first_settings(name, connection.coordinator, connection.local_port, open_folder(data))
        if new
        else ""
    )
    for private in (folder.path, folder.key.parent, folder.home, folder.logs):
        private_folder(private)
    if folder.coordinator.exists() and folder.coordinator.read_bytes() != certificate:
        msg = f"{folder.coordinator} is another certificate than {authority}; remove one of them"
        raise SettingsError(msg)
    write_atomic(folder.coordinator, certificate)
    if new:
        write_atomic(folder.settings_file, first.encode(), private=True)
    elif folder.settings.name != name:
        msg = f"this is the folder of site {folder.settings.name!r}, got {name!r}"
        raise SettingsError(msg)
    if not folder.secret.exists():
        write_atomic(folder.secret, secrets.token_hex(32).encode(), private=True)
    site_request(folder).write(folder.request_file(name))
    return folder


def site_request(folder: SiteFolder) -> SiteRequest:
    """Return the request of a site; its key is made now if there is none."""
    if not folder.key.exists():
        made = ec.generate_private_key(ec.SECP384R1())
        text = made.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        write_atomic(folder.key, text, private=True)
    private = serialization.load_ssh_private_key(folder.key.read_bytes(), None)
    public = private.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return SiteRequest(name=folder.settings.name, public_key=public.decode())


def _certificate(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        x509.load_pem_x509_certificate(data)
    except ValueError:
        msg = f"{path}: expected the certificate that the coordinator gave (ca.crt)"
        raise SettingsError(msg) from None
    return data
