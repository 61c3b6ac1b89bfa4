"""The nginx configuration lets sites through to the SuperLink, and nothing else."""

import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dafne_federated.core.flower_command import answers, free_port
from dafne_federated.server.deployment_folder import ServerFolder, ServerSettings, make_server
from dafne_federated.server.gateway import LARGEST_BODY, PATHS
from tests.echo_server import echoing

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx on this machine")

CONFIGURATION = Path(__file__).parents[2] / "deployment" / "nginx.conf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    chosen = ServerSettings(hosts=("localhost",), local_port=free_port())
    return make_server(tmp_path_factory.mktemp("nginx"), chosen)


@pytest.fixture(scope="module")
def upstream(folder: ServerFolder) -> Iterator[None]:
    """What stands in the SuperLink's place."""
    with echoing(folder, "flwr-signature"):
        yield


@pytest.fixture(scope="module")
def door(
    folder: ServerFolder, upstream: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """An nginx with our configuration; only folder and ports are other ones."""
    port, own = free_port(), tmp_path_factory.mktemp("nginx-own")
    text = CONFIGURATION.read_text()
    text = text.replace("/srv/dafne-federated/coordinator", str(folder.path))
    text = text.replace("listen 9443 ssl", f"listen 127.0.0.1:{port} ssl")
    text = text.replace("127.0.0.1:9500", f"127.0.0.1:{folder.settings.local_port}")
    places = "".join(
        f"{kind}_temp_path {own}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = own / "nginx.conf"
    main.write_text(
        f"daemon off;\npid {own}/pid;\nerror_log {own}/error.log;\n"
        f"events {{}}\nhttp {{\n{places}{text}\n}}\n"
    )
    main.parent.chmod(0o755)
    asked = [str(NGINX), "-p", str(own), "-c", str(main), "-e", f"{own}/error.log"]
    tried = subprocess.run([*asked, "-t"], capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stderr
    assert "warn" not in tried.stderr
    process = subprocess.Popen(asked)
    try:
        while not answers(port):
            assert process.poll() is None, (own / "error.log").read_text()
            time.sleep(0.02)
        trusting = ssl.create_default_context(cafile=str(folder.authority))
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("path", PATHS)
def test_what_sites_need_passes_unchanged(door: httpx.Client, path: str) -> None:
    answer = door.post(path, content=b"x", headers={"flwr-signature": "this"})
    assert (answer.status_code, answer.content) == (203, b"x")
    assert (answer.headers["x-said"], answer.headers["x-path"]) == ("this", path)


def test_a_body_of_several_mib_passes_unchanged(door: httpx.Client) -> None:
    body = bytes(range(256)) * 28_000
    assert door.post(PATHS[0], content=body).content == body


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/get-run/",
        "/v1/fleet/get-run%0a",
        "/v1/fleet/get-run/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/health",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_everything_else_is_not_found(door: httpx.Client, path: str) -> None:
    assert raw(door, "POST", path) == 404


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run/../../fleet/get-run", "/v1//fleet/get%2drun"]
)
def test_a_path_that_is_written_otherwise_arrives_as_it_was_compared(
    door: httpx.Client, path: str
) -> None:
    assert raw(door, "POST", path, "x-path: /v1/fleet/get-run") == 203


def test_sites_only_post(door: httpx.Client) -> None:
    assert door.get(PATHS[0]).status_code == 405


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_itself(
    door: httpx.Client,
) -> None:
    assert raw(door, "POST", PATHS[0], length=LARGEST_BODY + 1) == 413
    pieces = (bytes(2**20) for _ in range(LARGEST_BODY // 2**20 + 1))
    try:
        refused = door.post(PATHS[0], content=pieces).status_code == 413
    except httpx.NetworkError:  # the line was closed while there was more to send
        refused = True
    assert refused


def raw(door: httpx.Client, method: str, path: str, expected: str = "", length: int = 0) -> int:
    """Ask for a path exactly as it is written, without a body; return the status."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = door.base_url.port or 0
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as line,
    ):
        words = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        line.sendall(f"{words}Connection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: line.recv(65536), b"")).decode()
    assert expected in answer
    (status,) = re.findall(r"\AHTTP/1.1 (\d+)", answer)
    return int(status)
