"""Through the gateway pass only the paths of sites, bodies unchanged and of limited size."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from dafne_federated.core.flower_command import free_port
from dafne_federated.server.deployment_folder import ServerFolder, ServerSettings, make_server
from dafne_federated.server.gateway import LARGEST_BODY, PATHS, make_gateway
from tests.echo_server import echoing

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    chosen = ServerSettings(hosts=("localhost",), local_port=free_port())
    return make_server(tmp_path_factory.mktemp("gateway"), chosen)


@pytest.fixture(scope="module")
def upstream(folder: ServerFolder) -> Iterator[str]:
    """What stands in the SuperLink's place."""
    with echoing(folder, "x-said") as address:
        yield address


@asynccontextmanager
async def gateway(upstream: str, authority: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = make_gateway(upstream, authority)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="https://gateway") as client,
    ):
        yield client


def ask(upstream: str, authority: Path, method: str, path: str, **more: object) -> httpx.Response:
    async def send() -> httpx.Response:
        async with gateway(upstream, authority) as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


@pytest.mark.parametrize("path", PATHS)
def test_what_sites_need_passes_unchanged(folder: ServerFolder, upstream: str, path: str) -> None:
    answer = ask(upstream, folder.authority, "POST", path, content=b"x", headers={"x-said": "this"})
    assert (answer.status_code, answer.content) == (203, b"x")
    assert (answer.headers["x-said"], answer.headers["x-path"]) == ("this", path)


def test_a_body_of_several_mib_passes_unchanged(folder: ServerFolder, upstream: str) -> None:
    body = bytes(range(256)) * 28_000
    assert ask(upstream, folder.authority, "POST", PATHS[0], content=body).content == body


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("POST", "/v1/fleet/get-run/../../control/start-run"),
        ("POST", "/v1/fleet/get-run/"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("GET", "/health"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
    ],
)
def test_everything_else_is_not_found(
    folder: ServerFolder, upstream: str, method: str, path: str
) -> None:
    assert ask(upstream, folder.authority, method, path).status_code == 404


def test_sites_only_post(folder: ServerFolder, upstream: str) -> None:
    assert ask(upstream, folder.authority, "GET", PATHS[0]).status_code == 405


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_itself(
    folder: ServerFolder, upstream: str
) -> None:
    body = bytes(LARGEST_BODY + 1)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 2**20):
            yield body[start : start + 2**20]

    for content in (body, pieces()):
        answer = ask(upstream, folder.authority, "POST", PATHS[0], content=content)
        assert answer.status_code == 413


def test_while_the_superlink_is_away_sites_are_told_to_wait(folder: ServerFolder) -> None:
    nobody = f"https://127.0.0.1:{free_port()}"
    assert ask(nobody, folder.authority, "POST", PATHS[0]).status_code == 502


def test_a_superlink_with_another_certificate_is_not_spoken_to(
    folder: ServerFolder, upstream: str, tmp_path: Path
) -> None:
    other = make_server(tmp_path / "other", ServerSettings(hosts=("localhost",)))
    assert ask(upstream, other.authority, "POST", PATHS[0]).status_code == 502
