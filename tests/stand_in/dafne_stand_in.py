"""A server in this process that answers as Dafne's two servers do, faults and all."""

import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "correct-horse-battery-staple"
START = 1_700_000_000


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class StandIn:
    """The state of a server; what it holds can be read and changed by tests.

    Attributes:
        dialect: ``php`` or ``fastapi``.
        models: Canonical versions by model and by name, as text.
        about: The ``model.json`` of each model; its keys win in ``info_model``.
        pending: What contributors sent: model, file name, dice, bytes.
        parts: Parts of uploads by name of the upload.
        may_merge: Models for which the key has the merge permission.
        access: Models that the key has access to; all of them for None.
        requests: Routes and fields so far, without files.
        answers: Replace the next answers of a route: status and content.
        before: Called with route and fields before an answer is made.
        breaks: Sizes after which the next downloads break off.
        lost: How many of the next upload answers are lost after the work is done.
        ranges: Whether the rest of a file can be asked for.
        damage: How many of the next downloads arrive with a wrong byte.
    """

    def __init__(self, dialect: str = "php") -> None:
        self.dialect = dialect
        self.models: dict[str, dict[str, bytes]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.pending: list[tuple[str, str, str, bytes]] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        self.access: set[str] | None = None
        self.may_merge: set[str] = set()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        self.before: Callable[[str, dict[str, Any]], None] = lambda route, fields: None
        self.breaks: list[int] = []
        self.lost = 0
        self.ranges = False
        self.damage = 0
        self._now = START + 1000

    def newest(self, model: str) -> bytes:
        """The newest version as every client of the server sees it."""
        versions = self.models[model]
        return versions[max(versions)]

    def clock(self) -> int:
        """One second further at each look, so that tests need not wait."""
        self._now += 1
        return self._now

    def routes(self, name: str) -> list[dict[str, Any]]:
        return [fields for route, fields in self.requests if route == name]

    # Answers

    async def answer(self, request: Request) -> Response:
        route = request.path_params["route"]
        if request.method == "GET" and self.dialect == "fastapi":
            return PlainTextResponse("Method Not Allowed", 405)
        fields: dict[str, Any]
        file = b""
        if "multipart" in request.headers.get("content-type", ""):
            form = await request.form()
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            if "model_binary" in form:
                fields["sent name"] = form["model_binary"].filename
                file = await form["model_binary"].read()
        else:
            body = await request.body()
            fields = json.loads(body) if body else dict(request.query_params)
        if "range" in request.headers:
            fields["range"] = request.headers["range"]
        self.requests.append((route, fields))
        self.before(route, fields)
        if self.answers.get(route):
            status, content = self.answers[route].pop(0)
            if isinstance(content, bytes):
                return Response(content, status)
            if isinstance(content, dict) and "Location" in content:
                return Response(b"", status, headers=content)
            return JSONResponse(content, status)
        if fields.get("api_key") != KEY:
            return JSONResponse({"message": "invalid access code"}, 401)
        if refusal := self._refusal(route, fields.get("model_type")):
            return refusal
        handler = getattr(self, f"_{self.dialect}_{route}", None) or getattr(
            self, f"_{route}", None
        )
        if handler is None:
            return JSONResponse({"detail": "Not Found"}, 404)
        response: Response = handler(fields, file, request)
        if file and self.lost:
            self.lost -= 1
            return StreamingResponse(broken(b"", 0), headers={"Content-Length": "9"})
        response.headers["Date"] = formatdate(self._now, usegmt=True)
        return response

    def _refusal(self, route: str, name: str | None) -> Response | None:
        if self.dialect == "fastapi":
            known = name is None or name in self.models
            return None if known else PlainTextResponse("Internal Server Error", 500)
        if route == "upload_merged_model":
            if name not in self.may_merge:
                return JSONResponse({"message": "invalid access code"}, 401)
            return None if name in self.models else JSONResponse({"message": "unknown"}, 404)
        if name is not None and name not in (self.models if self.access is None else self.access):
            return JSONResponse({"message": "access denied for this model"}, 403)
        return None

    def _get_available_models(self, *_: Any) -> Response:
        extra = ["log.txt"] if self.dialect == "fastapi" else []
        return JSONResponse({"models": [*self.models, *extra]})

    def _info_model(self, fields: dict[str, Any], *_: Any) -> Response:
        self.clock()
        name = fields["model_type"]
        files = self.models[name]
        # The folder of an unfinished upload "x.model" looks like a version.
        phantoms = [
            f"chunks_{p.removesuffix('.model')}" for p in self.parts if p.endswith(".model")
        ]
        stamps = sorted([*files, *phantoms])
        if not stamps:
            return JSONResponse({"message": "No model available"}, 404)
        latest = stamps[-1]
        content: dict[str, Any] = {
            "latest_timestamp": latest,
            "hash": digest(files[latest]) if latest in files else "",
            "hashes": {s: digest(files[s]) if s in files else "" for s in stamps},
            "timestamps": stamps,
        }
        if self.dialect == "php":
            content["latest_size"] = len(files.get(latest, b""))
        return JSONResponse({**content, **self.about.get(name, {})})

    def _get_model(self, fields: dict[str, Any], _: bytes, request: Request) -> Response:
        stamp = fields["timestamp"]
        if not isinstance(stamp, str):
            if self.dialect == "fastapi":
                return JSONResponse({"detail": [{"msg": "not a string", "input": fields}]}, 422)
            return Response(b"", 500)
        data = self.models[fields["model_type"]].get(stamp)
        if data is None:
            return JSONResponse({"message": "Model not found"}, 500)
        headers = {"Content-Length": str(len(data))}
        if self.dialect == "php":
            headers["X-SHA256-Checksum"] = digest(data)
        if self.damage:
            self.damage -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        status, first = 200, 0
        if self.ranges and "range" in request.headers:
            first = int(request.headers["range"].removeprefix("bytes=").removesuffix("-"))
            if first >= len(data):
                return Response(b"", 416)
            status = 206
            headers["Content-Length"] = str(len(data) - first)
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        end = self.breaks.pop(0) if self.breaks else len(data)
        kind = "application/octet-stream"
        return StreamingResponse(broken(data[first:], end - first), status, headers, kind)

    # The PHP server

    def _php_upload_merged_model(self, fields: dict[str, Any], file: bytes, _: Any) -> Response:
        name = fields["model_type"]
        if not fields.get("sha256"):
            return JSONResponse({"message": "sha256 missing"}, 400)
        data = self._assembled(fields, file)
        if isinstance(data, Response):
            return data
        if digest(data) != fields["sha256"]:
            return JSONResponse({"message": "SHA-256 checksum mismatch"}, 422)
        stamp = self.clock()
        self.models[name][str(stamp)] = data  # also over another one of this second
        return JSONResponse({"message": "upload successful", "timestamp": stamp})

    def _php_upload_model(self, fields: dict[str, Any], file: bytes, _: Any) -> Response:
        data = self._assembled(fields, file)
        if isinstance(data, Response):
            return data
        if fields.get("original_hash", digest(data)) != digest(data):
            return JSONResponse({"message": "Communication error during upload"}, 500)
        stamp = str(self.clock())
        self.pending.append((fields["model_type"], stamp, fields.get("dice", ""), data))
        return JSONResponse({"message": "upload successful"})

    def _assembled(self, fields: dict[str, Any], file: bytes) -> bytes | Response:
        if "total_chunks" not in fields:
            return file
        index, total = int(fields["chunk_index"]), int(fields["total_chunks"])
        parts = self.parts.setdefault(fields["filename"], {})
        parts[index] = file
        if index < total - 1:
            return JSONResponse({"message": "chunk received"})
        joined = b""
        for number in range(total):
            if number not in parts:
                return JSONResponse({"message": f"missing chunk {number}"}, 500)
            joined += parts.pop(number)  # used up, even if a later one is missing
        del self.parts[fields["filename"]]
        return joined

    # The FastAPI server

    def _fastapi_upload_model(self, fields: dict[str, Any], file: bytes, _: Any) -> Response:
        self.pending.append((fields["model_type"], str(self.clock()), fields["dice"], file))
        if fields.get("original_hash", digest(file)) != digest(file):
            return JSONResponse([{"message": "Communication error during upload"}, 500])
        return JSONResponse({"message": "upload successful"})


async def broken(data: bytes, end: int) -> AsyncIterator[bytes]:
    """Send ``data``; if ``end`` is before its end, break the connection there."""
    yield data[:end]
    if end < len(data) or not data:
        raise ConnectionAbortedError


class Running:
    """A stand-in that listens on a port of this machine until it is stopped."""

    def __init__(self, stand_in: StandIn, **options: Any) -> None:
        app = Starlette(
            routes=[Route("/api/{route}", stand_in.answer, methods=["GET", "POST"])],
        )
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_config=None, log_level="critical",
            date_header=False, lifespan="off",
            timeout_graceful_shutdown=1, **options,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        scheme = "https" if "ssl_certfile" in options else "http"
        self.address = f"{scheme}://127.0.0.1:{port}/api/"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
