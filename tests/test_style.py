"""The code is formatted, free of lint, and typed strictly."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("core", "strategies", "server", "client", "simulations", "cli")


def run(*arguments: str, **options: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    pytest.importorskip("ruff")
    run("ruff", "check", str(ROOT))
    run("ruff", "format", "--check", str(ROOT))


def test_mypy_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    # mypy has to see the folders under the name they are imported by.
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "dafne_federated" / folder)
    run(
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "-p",
        "dafne_federated",
        cwd=tmp_path,
    )
