"""The Flower bundle of a federation: configuration only, and how a site tells.

Flower sends every site a zip file, the bundle, puts its folder first on Python's path and runs
what is in it. Ours holds no code: it names the programs that each side has installed. A site
that insists on this runs nothing that was sent to it.
"""

import io
import json
import tomllib
import zipfile
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import BundleError
from dafne_federated.core.versions import software_version

SERVER_APP = "dafne_federated.server.app:app"
CLIENT_APP = "dafne_federated.client.app:app"

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
        run: The folder of the run, which the server needs to know.
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
run = {json.dumps(str(run.resolve()))}
''',
        encoding="utf-8",
    )
    (folder / "README.md").write_text("Configuration of one federation.\n", encoding="utf-8")


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
