"""A TLS server in the SuperLink's place that sends back what it is sent."""

import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dafne_federated.core.flower_command import answers
from dafne_federated.server.deployment_folder import ServerFolder


@contextlib.contextmanager
def echoing(folder: ServerFolder, header: str) -> Iterator[str]:
    """Serve at the local port of a coordinator, and give its address.

    Args:
        folder: The coordinator.
        header: Whose value comes back as ``x-said``; the path comes back as ``x-path``.
    """

    async def echo(request: Request) -> Response:
        headers = {"x-said": request.headers.get(header, ""), "x-path": request.url.path}
        return Response(await request.body(), status_code=203, headers=headers)

    port = folder.settings.local_port
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])]),
            port=port, log_level="error",
            ssl_certfile=str(folder.certificate), ssl_keyfile=str(folder.key),
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run)
    thread.start()
    while not answers(port):
        time.sleep(0.02)
    yield f"https://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
