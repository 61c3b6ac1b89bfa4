"""A coordinator without sites, as processes: registration, status and its one supervisor."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

pytestmark = pytest.mark.slow

from dafne_federated.core.site_request import SiteRequest  # noqa: E402
from dafne_federated.core.supervision import supervisor  # noqa: E402
from dafne_federated.server.deployment_folder import (  # noqa: E402
    ServerFolder,
    ServerSettings,
    make_server,
)
from dafne_federated.server.flower_nodes import flower_nodes  # noqa: E402
from dafne_federated.server.registration import registered_sites, site_states  # noqa: E402
from tests.deployment.deployed import Deployment, free_ports, wait_for  # noqa: E402

KILLED = """
import os, signal, sys
from pathlib import Path
from dafne_federated.core.site_request import SiteRequest
from dafne_federated.server import registration
from dafne_federated.server.deployment_folder import ServerFolder
registration._keep = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
command, folder, name, *request = sys.argv[1:]
given = [SiteRequest.read(Path(path)) for path in request]
getattr(registration, command)(ServerFolder(Path(folder)), name, *given)
"""


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """It listens on an address that is neither all nor the usual one."""
    path, port = tmp_path_factory.mktemp("coordinator"), free_ports()
    chosen = ServerSettings(
        hosts=("localhost",), listen="127.0.0.3", port=port, local_port=port + 1
    )
    server = make_server(path / "coordinator", chosen)
    made = Deployment(path, dict(os.environ), server, {}, port, port)
    process = made.started("server", "start", server.path)
    try:
        wait_for(lambda: made.command("server", "status", server.path).returncode == 0)
        yield made
    finally:
        made.command("server", "stop", server.path)
        process.kill()
        process.wait()


def request(coordinator: Deployment, name: str) -> Path:
    """Write what a site with a new key would send."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    openssh = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path = coordinator.path / f"{name}.request.json"
    SiteRequest(name=name, public_key=key.public_bytes(*openssh).decode()).write(path)
    return path


def killed_before_writing(server: ServerFolder, *arguments: object) -> None:
    command, *rest = map(str, arguments)
    process = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, command, str(server.path), *rest], check=False
    )
    assert process.returncode == -signal.SIGKILL


def names(server: ServerFolder) -> list[str]:
    return [site.name for site in registered_sites(server) if not site.revoked]


def test_two_registrations_at_once_are_both_kept(coordinator: Deployment) -> None:
    server, wanted = coordinator.server, ["lake", "river", "sea"]
    files = {name: request(coordinator, name) for name in wanted}
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(
                lambda name: coordinator.done("server", "register", server.path, name, files[name]),
                wanted,
            )
        )
    assert sorted(names(server)) == wanted
    assert site_states(server) == dict.fromkeys(wanted, "registered")
    keys = {name: SiteRequest.read(file).public_key for name, file in files.items()}
    assert {node.name: node.public_key for node in flower_nodes(server)} == keys


def test_a_registration_that_was_killed_is_healed_by_the_next(coordinator: Deployment) -> None:
    server, file = coordinator.server, request(coordinator, "hill")
    killed_before_writing(server, "register", "hill", file)
    (orphan,) = (node for node in flower_nodes(server) if node.name == "hill")
    assert "hill" not in names(server)
    coordinator.done("server", "register", server.path, "hill", file)
    (kept,) = (site for site in registered_sites(server) if site.name == "hill")
    assert (kept.node, kept.public_key) == (orphan.number, orphan.public_key)


def test_a_killed_registration_leaves_no_second_key_under_a_name(coordinator: Deployment) -> None:
    server = coordinator.server
    killed_before_writing(server, "register", "wood", request(coordinator, "wood"))
    file = request(coordinator, "wood")  # meanwhile the site made a new key
    coordinator.done("server", "register", server.path, "wood", file)
    (node,) = (node for node in flower_nodes(server) if node.name == "wood")
    assert node.public_key == SiteRequest.read(file).public_key


def test_a_revocation_that_was_killed_is_finished_by_the_next(coordinator: Deployment) -> None:
    server, file = coordinator.server, request(coordinator, "moor")
    coordinator.done("server", "register", server.path, "moor", file)
    killed_before_writing(server, "revoke", "moor")
    assert "moor" in names(server)
    assert "moor" not in [node.name for node in flower_nodes(server)]
    coordinator.done("server", "revoke", server.path, "moor")
    assert "moor" not in names(server)
    again = coordinator.command("server", "register", server.path, "moor", file)
    assert (again.returncode, "this key was registered before" in again.stderr) == (1, True)


def test_a_second_start_leaves_what_the_first_unpacked(coordinator: Deployment) -> None:
    unpacked = coordinator.server.home / "apps" / "of-a-run"
    unpacked.mkdir(parents=True)
    second = coordinator.command("server", "start", coordinator.server.path)
    assert (second.returncode, "is started already" in second.stderr) == (1, True)
    assert unpacked.exists()
    assert supervisor(coordinator.server.lock) is not None


def test_watching_shows_the_state_again_and_again(coordinator: Deployment) -> None:
    command = [*coordinator.program, "server", "status", str(coordinator.server.path), "--watch"]
    terminal, other_end = pty.openpty()
    piped = subprocess.Popen(command, env=coordinator.environment, stdout=subprocess.PIPE)
    shown = subprocess.Popen(
        command, env=coordinator.environment, stdout=other_end, stderr=other_end
    )
    os.close(other_end)
    assert piped.stdout is not None
    screen, text = "", ""
    while screen.count("  gateway ") < 2:
        screen += os.read(terminal, 65536).decode()
    while text.count("  gateway ") < 2:
        text += piped.stdout.readline().decode()
    for process in (shown, piped):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    piped.stdout.close()
    os.close(terminal)
    assert "\x1b" not in text
    first, *screens = screen.split("\x1b[2J\x1b[1;1H")
    assert (first, len(screens)) == ("", 2)
    for one in (*screens, text):
        assert "coordinator: running" in one
        assert "  superlink " in one  # a busy machine may answer late, and count as down
