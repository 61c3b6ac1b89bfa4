"""The Flower bundle of a federation: configuration only, and how a site tells.

Flower sends every site a zip file, the bundle, puts its folder first on Python's path and runs
what is in it. Ours holds no code: it names the programs that each side has installed. A site
that insists on this runs nothing that was sent to it. Ours holds no path either: the run is
named, and whoever started the programs of this machine tells them where its runs lie.
"""

import io
import json
import os
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import BundleError, SettingsError
from dafne_federated.core.versions import software_version

SERVER_APP = "dafne_federated.server.app:app"
CLIENT_APP = "dafne_federated.client.app:app"
RUNS = "DAFNE_FEDERATED_RUNS"  # in the environment: the folder of all runs of this machine

_FILES = frozenset({"pyproject.toml", "README.md", "LICENSE", ".info/CONTENT"})
_NEEDED = "pyproject.toml"
_LARGEST = 64 * 1024  # bytes of one file; ours has less than 1 KiB
_COMPONENTS = {"serverapp": SERVER_APP, "clientapp": CLIENT_APP}
_TABLES = frozenset({"project", "tool"})
_FLOWER_TABLES = frozenset(
    {"publisher", "fab-include", "fab-format-version", "flwr-version-target"}
    | {"components", "config"}
)
_REASONS = {
    "more": "the bundle holds more than configuration",
    "programs": "the bundle names other programs than those of this package",
    "settings": f"{_NEEDED} in the bundle has settings that it should not",
    "other": f"{_NEEDED} in the bundle is not the configuration of a Flower app",
    "files": f"the bundle should hold each file once, and {_NEEDED}",
    "large": f"a file in the bundle has more than {_LARGEST} bytes",
    "damaged": "the bundle is damaged",
}


def write_app(folder: Path, run: Path) -> None:
    """Write a Flower app that holds no code, only the names of what is installed.

    Args:
        folder: Where; ``flwr run`` makes the bundle of it.
        run: The folder of the run; only its name is written.
    """
    name = f"dafne-run-{software_version().replace('.', '-')}"
    (folder / _NEEDED).write_text(
        f'''[project]
name = "{name}"
version = "0.1.0"
description = "A federation of dafne-federated; the code is the installed package"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "dafne"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "{SERVER_APP}"
clientapp = "{CLIENT_APP}"

[tool.flwr.app.config]
run = {json.dumps(run.name)}
''',
        encoding="utf-8",
    )
    (folder / "README.md").write_text("Configuration of one federation.\n", encoding="utf-8")


def run_folder_path(run_config: Mapping[str, Any]) -> Path:
    """Return the folder of the run that a configuration names.

    Where Flower's programs are not used, the configuration never leaves this process, nobody
    says where runs lie, and it holds the path.

    Raises:
        SettingsError: It names none, or the programs were not told where runs lie.
    """
    name, runs = str(run_config.get("run", "")), os.environ.get(RUNS, "")
    if not runs and Path(name).is_absolute():
        return Path(name)
    if not runs or name in ("", "..") or Path(name).name != name:
        msg = f"expected the name of a run, and in {RUNS} the folder of runs, got {name!r}"
        raise SettingsError(msg)
    return Path(runs, name)


def check_bundle(content: bytes) -> None:
    """Refuse a bundle that is more than configuration, or names other programs than ours.

    Nothing is unpacked.

    Raises:
        BundleError: In words, why; they hold nothing of the site.
    """
    text = _configuration(content)
    try:
        values = tomllib.loads(text)
        app = values["tool"]["flwr"]["app"]
        components = dict(app["components"])
        others = set(values) - _TABLES | set(values["tool"]) - {"flwr"}
        others |= set(values["tool"]["flwr"]) - {"app"} | set(app) - _FLOWER_TABLES
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(_REASONS["other"]) from None
    if components != _COMPONENTS:
        detail = f"{_short(components)}, expected {_short(_COMPONENTS)}"
        raise BundleError(_REASONS["programs"], detail)
    if others:
        raise BundleError(_REASONS["settings"], _short(sorted(others)))


def _configuration(content: bytes) -> str:
    """Return ``pyproject.toml`` of a bundle whose every file is small and expected."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if extra := sorted(set(names) - _FILES):
                raise BundleError(_REASONS["more"], _short(extra))
            if len(set(names)) != len(names) or _NEEDED not in names:
                raise BundleError(_REASONS["files"])
            if any(entry.file_size > _LARGEST for entry in entries):
                raise BundleError(_REASONS["large"])
            return archive.read(_NEEDED).decode()
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, EOFError, NotImplementedError):
        raise BundleError(_REASONS["damaged"]) from None


def _short(value: Any) -> str:
    """Return a value that somebody else chose, as printable text of limited length."""
    return ascii(value)[:200]
