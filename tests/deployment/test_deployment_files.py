"""The files for operators can be read, and name commands, folders and settings that there are."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from dafne_federated.cli.app import app
from dafne_federated.core.flower_command import quiet_environment
from dafne_federated.server.deployment_folder import ServerSettings
from dafne_federated.server.gateway import LARGEST_BODY, PATHS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployment"
UNITS = sorted(FOLDER.glob("*.service"))
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("coordinator.md", "site.md")}
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
# Instructions of the Dockerfile, each on one line.
DOCKERFILE = [
    line
    for line in re.sub(r"\\\n", "", (FOLDER / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]


def require_command(typed: Sequence[str]) -> None:
    """Fail where what follows the program's name is not a command with all that it needs."""
    command, words = typer.main.get_command(app), list(typed)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context("dafne-federated", words)


def unit(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the settings of a unit by section; a name may stand there more than once."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            sections[line.strip("[]")] = kept = []
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            kept.append((name, value))
    return sections


def compose() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def quiet(home: Path) -> dict[str, str]:
    """Return what Flower's programs are told here, whatever this process was told."""
    told = quiet_environment(home)
    return {n: v for n, v in told.items() if n.startswith(("FLWR_D", "FLWR_T", "RAY_U", "TF_CPP"))}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_there_is_and_starts_it_again(path: Path) -> None:
    service = dict(unit(path)["Service"])
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "dafne-federated"
    require_command(words)
    assert service["Restart"] == "always"  # Flower's node ends with status 0 when it is sent away
    folder = Path(words[-1])
    assert folder.is_relative_to(service["ReadWritePaths"])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_calls_nobody_and_gives_no_rights(path: Path, tmp_path: Path) -> None:
    service = unit(path)["Service"]
    told = dict(value.split("=", 1) for name, value in service if name == "Environment")
    assert quiet(tmp_path).items() <= told.items()
    assert told["NO_PROXY"] == told["no_proxy"] == "127.0.0.1,localhost"
    expected = {
        ("ProtectSystem", "strict"), ("NoNewPrivileges", "yes"), ("PrivateTmp", "yes"),
        ("ProtectHome", "yes"), ("UMask", "0077"), ("CapabilityBoundingSet", ""),
    }  # fmt: skip
    assert expected <= set(service)
    assert "root" not in dict(service)["User"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_a_unit(path: Path, tmp_path: Path) -> None:
    here = tmp_path / path.name
    program = "/opt/dafne-federated/bin/dafne-federated"
    here.write_text(path.read_text().replace(program, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(here)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_compose_builds_from_a_dockerfile_with_the_arguments_that_it_names() -> None:
    arguments = {line.split()[1].split("=")[0] for line in DOCKERFILE if line.startswith("ARG ")}
    for service in compose()["services"].values():
        build = service["build"]
        assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"
        assert set(build["args"]) == arguments


def test_the_services_of_compose_start_and_ask_with_commands_that_there_are() -> None:
    services = compose()["services"]
    for service in services.values():
        require_command(service["command"])
        kind, program, *words = service["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "dafne-federated")
        require_command(words)
        assert service["restart"] == "always"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    assert "ports" not in services["site"]  # nothing connects in
    port = ServerSettings.model_fields["port"].default
    assert services["coordinator"]["ports"] == [f"{port}:{port}"]


def test_the_dockerfile_copies_what_is_installed_and_nothing_else() -> None:
    copied = {
        source
        for line in DOCKERFILE
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }  # fmt: skip
    folders = {package.split(".")[1] for package in PACKAGES}
    assert copied == folders | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert all((ROOT / source).exists() for source in copied)


def test_the_dockerfile_runs_our_command_without_rights_and_calls_nobody(tmp_path: Path) -> None:
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in DOCKERFILE}
    assert told["ENTRYPOINT"] == '["dafne-federated"]'
    (created,) = re.findall(r"useradd .*--uid (\d+)", "\n".join(DOCKERFILE))
    assert told["USER"] == created
    environment = dict(word.split("=", 1) for word in told["ENV"].split())
    assert quiet(tmp_path).items() <= environment.items()


def test_nginx_lets_through_what_the_gateway_lets_through() -> None:
    text = (FOLDER / "nginx.conf").read_text()
    (names,) = re.findall(r"location ~ \^/v1/fleet/\(([a-z|-]+)\)\\z ", text)
    assert {f"/v1/fleet/{name}" for name in names.split("|")} == set(PATHS)
    assert f"client_max_body_size {LARGEST_BODY // 2**20}m;" in text
    assert f"server 127.0.0.1:{ServerSettings.model_fields['local_port'].default};" in text
    assert len(re.findall(r"^    location ", text, flags=re.MULTILINE)) == 2


def test_the_pages_tell_of_every_file() -> None:
    for path in FOLDER.iterdir():
        told = [name for name, page in PAGES.items() if f"(../deployment/{path.name})" in page]
        assert told, path.name


def test_commands_for_containers_can_be_typed() -> None:
    files = ((FOLDER / name).read_text() for name in ("compose.yaml", "Dockerfile"))
    text = "\n".join((*files, *PAGES.values())).replace("\\\n", "")
    found = re.findall(r"run --rm \w+ (.+)$|exec \w+ +dafne-federated (.+)$", text, re.MULTILINE)
    assert len(found) >= 6
    for words in found:
        require_command(shlex.split(words[0] or words[1]))
