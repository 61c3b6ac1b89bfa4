"""Whoever opens connections and says nothing keeps no site out, and is sent away."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from dafne_federated.core.flower_command import free_port
from dafne_federated.core.health import speaks_tls
from dafne_federated.server import gateway_connections
from dafne_federated.server.deployment_folder import ServerFolder, ServerSettings, make_server
from dafne_federated.server.gateway import PATHS, gateway_server
from dafne_federated.server.gateway_connections import CONNECTIONS, PER_ADDRESS

SITE, STRANGER = "127.0.0.1", "127.0.0.2"


@contextlib.contextmanager
def served(folder: ServerFolder) -> Iterator[uvicorn.Server]:
    """The gateway of a coordinator whose SuperLink is away: who asks is told to wait."""
    server = gateway_server(folder)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def wait_for(ready: Callable[[], object]) -> None:
    end = time.monotonic() + 20.0
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def made(path: Path, listen: str) -> ServerFolder:
    ports = {"port": free_port(), "local_port": free_port()}
    return make_server(path, ServerSettings(hosts=("localhost",), listen=listen, **ports))


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    return made(tmp_path / "coordinator", "127.0.0.1")


def connected(folder: ServerFolder, address: str) -> ssl.SSLSocket:
    trust = ssl.create_default_context(cafile=str(folder.authority))
    where = ("127.0.0.1", folder.settings.port)
    plain = socket.create_connection(where, timeout=20, source_address=(address, 0))
    return trust.wrap_socket(plain, server_hostname="localhost")


def status(connection: ssl.SSLSocket) -> int:
    connection.sendall(f"POST {PATHS[0]} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
    return int(connection.recv(4096).split()[1])


def is_closed(connection: ssl.SSLSocket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_three_hundred_idle_connections_keep_no_site_out(folder: ServerFolder) -> None:
    with served(folder) as server, contextlib.ExitStack() as stack:
        known = stack.enter_context(connected(folder, SITE))
        assert status(known) == 502  # that is the answer while there is no SuperLink
        for _ in range(300):
            stack.enter_context(connected(folder, STRANGER))
        wait_for(lambda: len(server.server_state.connections) == 1 + PER_ADDRESS)
        assert status(known) == 502
        for address in (SITE, STRANGER):  # the stranger's own neighbours get through, too
            assert status(stack.enter_context(connected(folder, address))) == 502
        trust = ssl.create_default_context(cafile=str(folder.authority))
        url = f"https://localhost:{folder.settings.port}{PATHS[0]}"
        assert httpx.post(url, verify=trust).status_code == 502


def test_many_addresses_together_keep_no_site_out(folder: ServerFolder) -> None:
    with served(folder) as server, contextlib.ExitStack() as stack:
        known = stack.enter_context(connected(folder, SITE))
        for number in range(CONNECTIONS + 50):
            stack.enter_context(connected(folder, f"127.0.1.{number % 10}"))
        wait_for(lambda: len(server.server_state.connections) == CONNECTIONS)
        assert status(known) == 502
        assert status(stack.enter_context(connected(folder, SITE))) == 502


@pytest.mark.parametrize("first", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\n"])
def test_headers_that_do_not_come_in_time_are_not_waited_for(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(gateway_connections, "HEADER_WAIT", 1.0)
    with served(folder) as server, connected(folder, STRANGER) as slow:
        slow.sendall(first)
        wait_for(lambda: len(server.server_state.connections) == 1)

        def sent_away() -> bool:
            with contextlib.suppress(OSError):
                slow.sendall(b"x" if first else b"")  # one byte after the other
            return not server.server_state.connections

        wait_for(sent_away)
        wait_for(lambda: is_closed(slow))


def test_a_second_request_on_a_connection_is_not_waited_for_either(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_connections, "HEADER_WAIT", 1.0)
    with served(folder), connected(folder, STRANGER) as slow:
        assert status(slow) == 502
        time.sleep(1.2)
        assert not is_closed(slow)  # idle between two requests, as the connections of sites are
        slow.settimeout(20)
        slow.sendall(b"P")
        wait_for(lambda: is_closed(slow))


def test_a_connection_without_a_handshake_is_not_waited_for(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_connections, "HEADER_WAIT", 1.0)
    with served(folder):
        silent = socket.create_connection(("127.0.0.1", folder.settings.port), timeout=20)
        assert silent.recv(1) == b""
        silent.close()


def test_a_body_under_way_keeps_its_place(folder: ServerFolder) -> None:
    head = f"POST {PATHS[0]} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na".encode()
    listener = socket.create_server(("127.0.0.1", folder.settings.local_port))
    with listener, served(folder) as server, contextlib.ExitStack() as stack:
        busy = stack.enter_context(connected(folder, STRANGER))
        busy.sendall(head)  # and whom it is passed on to says nothing yet
        wait_for(lambda: server.server_state.tasks)
        for _ in range(PER_ADDRESS + 20):
            stack.enter_context(connected(folder, STRANGER))
        wait_for(lambda: len(server.server_state.connections) == PER_ADDRESS)
        assert not is_closed(busy)


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.7", "0.0.0.0", "::1", "::", "localhost"])
def test_a_gateway_is_found_where_it_listens(tmp_path: Path, listen: str) -> None:
    folder, other = made(tmp_path / "one", listen), made(tmp_path / "other", listen)
    port = folder.settings.port
    assert not speaks_tls(listen, port, folder.authority)
    with served(folder):
        assert speaks_tls(listen, port, folder.authority)
        assert not speaks_tls(listen, port, other.authority)
    with socket.create_server(("127.0.0.1", port)) as silent:
        assert silent.getsockname()[1] == port
        assert not speaks_tls("127.0.0.1", port, folder.authority, timeout=0.2)
