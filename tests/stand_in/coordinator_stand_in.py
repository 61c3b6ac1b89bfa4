"""A TLS server that answers as one likes, with a certificate as one likes; a CONNECT proxy."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

KNOWN = b'{"code": 2003}'  # what Flower's SuperLink says to a key that it knows, and to another
UNKNOWN = b'{"code": 2004}'


def write_certificate(path: Path, host: str, days: float = 90) -> Path:
    """Write a certificate and its key into one file; it is its own authority."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand-in")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=200)).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@dataclass
class StandIn:
    """What listens; ``seen`` has the first line of each request."""

    port: int = 0
    seen: list[str] = field(default_factory=list)


@contextmanager
def coordinator(
    certificate: Path, body: bytes = KNOWN, status: str = "400 Bad Request", ahead: float = 0
) -> Iterator[StandIn]:
    """Run a server whose clock is ``ahead`` seconds ahead."""
    made = StandIn()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        made.seen.append(head.decode().splitlines()[0])
        date = datetime.now(UTC) + timedelta(seconds=ahead)
        line = f"Date: {date:%a, %d %b %Y %H:%M:%S} GMT\r\n"  # twice, as through the gateway
        writer.write(
            f"HTTP/1.1 {status}\r\n{line}{line}"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with _listening(made, answer, context):
        yield made


@contextmanager
def connect_proxy(target: int, allows: bool = True) -> Iterator[StandIn]:
    """Run a proxy that leads every name to port ``target`` of this machine, or refuses."""
    made = StandIn()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        made.seen.append(head.decode().splitlines()[0])
        if not allows:
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()
            return
        inner, outer = await asyncio.open_connection("127.0.0.1", target)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_pump(reader, outer), _pump(inner, writer), return_exceptions=True)

    with _listening(made, answer, None):
        yield made


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.close()


@contextmanager
def _listening(made: StandIn, answer: object, context: ssl.SSLContext | None) -> Iterator[None]:
    ready, ended = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)  # type: ignore[arg-type]
        made.port = server.sockets[0].getsockname()[1]
        ready.set()
        await ended.wait()
        server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
