"""The folder of a coordinator: its settings, keys, database and runs.

server.toml         settings, for people to edit
ca.crt              what sites know the coordinator by; not secret
release.pub         what others know its releases by; not secret
keys/               certificate authority, server certificate, key that signs releases, secret
                    between Flower's programs
sites.json          who was registered, with which key
runs/               one folder a run
flower/             Flower's own settings, and its database: messages under way are in it
logs/               what the programs said
"""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from dafne_federated.core.dashed import DASHED
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import private_folder, write_atomic
from dafne_federated.core.flower_bundle import RUNS
from dafne_federated.core.flower_command import quiet_environment, write_connection
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.signed_release import make_signing_key
from dafne_federated.core.toml_file import checked, read_toml
from dafne_federated.server.certificates import make_authority, make_server_certificate


class ServerSettings(BaseModel):
    """What a coordinator's people may choose.

    Attributes:
        hosts: Names and addresses under which sites reach it.
        listen: Address of this machine that the gateway listens on.
        port: Port of the gateway, the only one that sites need.
        local_port: First of three ports of this machine alone: Flower's SuperLink, and the
            health of it and of the program that starts runs.
    """

    model_config = DASHED

    hosts: tuple[str, ...] = Field(min_length=1)
    listen: str = "0.0.0.0"
    port: int = Field(default=9443, ge=1, le=65535)
    local_port: int = Field(default=9500, ge=1, le=65533)


class ServerFolder:
    """Where things are in the folder of a coordinator; see the head of this file."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.settings_file = self.path / "server.toml"
        self.authority = self.path / "ca.crt"
        self.authority_key = self.path / "keys" / "ca.key"
        self.certificate = self.path / "keys" / "server.crt"
        self.key = self.path / "keys" / "server.key"
        self.release_key = self.path / "keys" / "release.key"
        self.release_public = self.path / "release.pub"
        self.secret = self.path / "keys" / "superexec.secret"
        self.sites = self.path / "sites.json"
        self.sites_lock = self.path / "sites.lock"
        self.launch_lock = self.path / "launch.lock"
        self.runs = self.path / "runs"
        self.home = self.path / "flower"
        self.database = self.home / "superlink.db"
        self.logs = self.path / "logs"
        self.lock = self.path / "lock"

    @property
    def settings(self) -> ServerSettings:
        """What ``server.toml`` says.

        Raises:
            SettingsError: This is no folder of a coordinator, or a setting is wrong.
        """
        missing = "not found; make it with 'dafne-federated server init'"
        values = read_toml(self.settings_file, missing)
        return checked(ServerSettings, values, self.settings_file)

    @property
    def environment(self) -> dict[str, str]:
        """The environment for Flower's programs here."""
        return {**quiet_environment(self.home), RUNS: str(self.runs)}

    def run_path(self, name: str) -> Path:
        """Return the folder of a run.

        Raises:
            SettingsError: The name would lead elsewhere.
        """
        if not name or name in (".", "..") or "/" in name:
            msg = f"expected the name of a run, such as 'first', got {name!r}"
            raise SettingsError(msg)
        return self.runs / name


def make_server(path: Path, chosen: ServerSettings) -> ServerFolder:
    """Make the folder of a coordinator, or what is missing in one; nothing is replaced.

    Raises:
        SettingsError: What is there does not fit what is asked for.
    """
    folder = ServerFolder(path)
    for private in (folder.path, folder.key.parent, folder.home, folder.runs, folder.logs):
        private_folder(private)
    if folder.settings_file.exists():
        settings = folder.settings
        if missing := [host for host in chosen.hosts if host not in settings.hosts]:
            msg = f"{folder.settings_file}: add {', '.join(missing)} to 'hosts' there"
            raise SettingsError(msg)
    else:
        settings = chosen
        write_atomic(folder.settings_file, _settings_text(chosen).encode(), private=True)
    make_authority(folder.authority, folder.authority_key)
    make_server_certificate(
        folder.certificate, folder.key, settings.hosts, folder.authority, folder.authority_key
    )
    make_signing_key(folder.release_key, folder.release_public)
    if not folder.secret.exists():
        write_atomic(folder.secret, secrets.token_hex(32).encode(), private=True)
    write_connection(folder.home, settings.local_port, folder.authority)
    return folder


def home_of(run: RunFolder) -> ServerFolder | None:
    """Return the coordinator that a run belongs to; None for one of a simulation."""
    for parent in run.path.resolve().parents:  # a version lies deeper than a run
        folder = ServerFolder(parent)
        if folder.settings_file.exists() and folder.release_key.exists():
            return folder
    return None


def signing_key(run: RunFolder) -> Path | None:
    """Return the key that signs the release of a run; a simulation has none."""
    home = home_of(run)
    return home.release_key if home else None


def _settings_text(settings: ServerSettings) -> str:
    return f"""\
# A coordinator of dafne-federated. Changes count from the next 'server start'.

# Names and addresses under which the sites reach this machine; they are in the certificate.
hosts = {_list(settings.hosts)}

# Where the gateway listens: the only door for the sites, and the only port to open.
listen = {json.dumps(settings.listen)}
port = {settings.port}

# First of three ports that only this machine itself uses. Whoever can log in here can use
# them, and so start runs and register sites: give the coordinator a machine of its own.
local-port = {settings.local_port}
"""


def _list(values: Sequence[str]) -> str:
    return f"[{', '.join(json.dumps(value) for value in values)}]"
