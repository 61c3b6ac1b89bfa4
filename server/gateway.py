"""The only door of the coordinator: what sites need passes, everything else is not found.

Flower's SuperLink serves sites and operators on one port, and asks operators for nothing: who
reaches it can start runs and register sites. So it listens on this machine alone, and the
gateway in front of it lets out only the paths that sites use; the SuperLink then checks their
keys. Bodies pass as they come, in pieces, and never stand in memory whole.
"""

import asyncio
import ssl
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.gateway_connections import (
    CONNECTIONS,
    GatewayConnection,
    GatewayLoop,
)

# What a node with a registered key asks for; nodes do not register themselves here.
# Source: flwr.supernode.fleet_http_client in Flower 1.41.
PATHS = tuple(
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages"),
        *("push-messages", "get-run", "get-fab", "push-object", "pull-object"),
        *("confirm-message-received",),
    )
)
LARGEST_BODY = 16 * 2**20  # bytes; Flower cuts arrays into pieces of 5 MiB
_PIECE_WAIT = 30.0  # seconds that a sender may be silent
_BODY_WAIT = 170.0  # seconds for a whole body; Flower gives up an object after 180
_NOT_FORWARDED = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"}
    | {"te", "trailer", "transfer-encoding", "upgrade", "host"}
)


class _TooLarge(Exception):  # noqa: N818 - it is caught here
    """A body is larger than anything that Flower sends."""


def make_gateway(upstream: str, authority: Path) -> Starlette:
    """Return the gateway to a SuperLink.

    Args:
        upstream: The SuperLink, such as ``https://127.0.0.1:9500``.
        authority: Certificate that the SuperLink's own is checked with.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        context = ssl.create_default_context(cafile=str(authority))
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=32)
        timeout = httpx.Timeout(120.0, connect=5.0)
        async with httpx.AsyncClient(
            base_url=upstream, verify=context, limits=limits, timeout=timeout, trust_env=False
        ) as client:
            app.state.client = client
            yield

    routes = [Route(path, _forward, methods=["POST"]) for path in PATHS]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


def gateway_server(folder: ServerFolder) -> uvicorn.Server:
    """Return the server of the gateway of a coordinator, to be run.

    Raises:
        SettingsError: ``folder`` is not one of a coordinator.
    """
    settings = folder.settings
    config = uvicorn.Config(
        make_gateway(f"https://127.0.0.1:{settings.local_port}", folder.authority),
        host=settings.listen,
        port=settings.port,
        ssl_certfile=str(folder.certificate),
        ssl_keyfile=str(folder.key),
        loop=f"{GatewayLoop.__module__}:{GatewayLoop.__name__}",
        http=GatewayConnection,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        server_header=False,
        access_log=False,
        log_level="warning",
    )
    return uvicorn.Server(config)


async def _forward(request: Request) -> Response:
    """Pass a request on, and its answer back, piece by piece."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > LARGEST_BODY:
        return Response(status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    client: httpx.AsyncClient = request.app.state.client
    passed = client.build_request(
        "POST",
        request.scope["path"],
        headers=_forwarded(request.headers.items()),
        content=_body(request),
    )
    try:
        answer = await client.send(passed, stream=True)
    except _TooLarge:
        return Response(status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    except (TimeoutError, ClientDisconnect):
        return Response(status_code=HTTPStatus.REQUEST_TIMEOUT)
    except httpx.HTTPError:  # the SuperLink is being started again; Flower's nodes then wait
        return Response(status_code=HTTPStatus.BAD_GATEWAY)
    return StreamingResponse(
        answer.aiter_raw(),
        status_code=answer.status_code,
        headers=dict(_forwarded(answer.headers.items())),
        background=BackgroundTask(answer.aclose),
    )


async def _body(request: Request) -> AsyncIterator[bytes]:
    """Yield the pieces of a body; a slow or endless one is cut off."""
    size, pieces, end = 0, aiter(request.stream()), time.monotonic() + _BODY_WAIT
    while True:
        try:
            async with asyncio.timeout(min(_PIECE_WAIT, end - time.monotonic())):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        size += len(piece)
        if size > LARGEST_BODY:
            raise _TooLarge
        yield piece


def _forwarded(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]


if __name__ == "__main__":
    gateway_server(ServerFolder(Path(sys.argv[1]))).run()
