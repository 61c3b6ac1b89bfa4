"""The checkout, the package table and the dependency rule agree."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]

# A folder may import folders of lower rank, and itself.
RANK = {"core": 0, "strategies": 1, "server": 2, "client": 2, "simulations": 3, "cli": 4}
NOT_EVEN_THEN = {("client", "strategies")}

# Heavy or risky libraries, and the only files that may import them.
DAFNE = {"core/model_runtime.py", "core/dafne_functions.py", "core/preprocessing.py"}
KERAS = {
    "core/adapters.py",
    "core/backend.py",
    "core/batch_statistics.py",
    "core/folded_layers.py",
    "core/loss_parts.py",
    "core/low_rank_layers.py",
    "core/network_graph.py",
    "core/network_layers.py",
    "core/partial_labels.py",
    "core/prefix_cache.py",
    "core/private_training.py",
    "core/proximal.py",
    "core/suffix_network.py",
    "core/training.py",
}
ONLY_IN = {
    "dafne_dl": DAFNE,
    "dill": set(),
    "pickle": {"core/model_file.py", "core/restricted_pickle.py"},
    "keras": KERAS | {"core/dafne_functions.py"},
    "tensorflow": {"core/backend.py"},
    "torch": {"core/metrics.py", "core/restricted_pickle.py"},
    "nibabel": {"core/volumes.py"},
    "ray": set(),
}

SOURCES = sorted(path for name in RANK for path in (ROOT / name).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_every_folder_with_code_is_packaged() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {f"dafne_federated.{f.replace('/', '.')}" for f in folders} == set(PACKAGES)


def test_nothing_here_shadows_the_installed_package() -> None:
    assert not (ROOT / "dafne_federated").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_follow_the_rule(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        library, *rest = name.split(".")
        if library == "dafne_federated":
            other = rest[0]
            assert other == own or RANK[other] < RANK[own], f"{own} may not import {name}"
            assert (own, other) not in NOT_EVEN_THEN, f"{own} may not import {name}"
        allowed = ONLY_IN.get(library)
        assert allowed is None or path.relative_to(ROOT).as_posix() in allowed, f"no {name} here"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_tested_versions_cover_every_dependency() -> None:
    pinned = {
        re.split(r"==|\s", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["simulation"], *extras["test"]]
    names = {re.split(r"[\[<>=!~; ]", text)[0].lower() for text in wanted}
    assert names <= pinned
