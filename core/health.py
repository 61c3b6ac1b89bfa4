"""Whether a program is up: Flower's answer the health protocol of gRPC, the gateway speaks TLS."""

import ipaddress
import socket
import ssl
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def serving(port: int, timeout: float = 2.0) -> bool:
    """Return whether the program with this health port says that it serves.

    Flower serves health without TLS, so the port is one of this machine only.

    Args:
        port: A port of the loopback address.
        timeout: Longest wait, in seconds.
    """
    with grpc.insecure_channel(f"127.0.0.1:{port}", _NO_PROXY) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def speaks_tls(listen: str, port: int, authority: Path, timeout: float = 5.0) -> bool:
    """Return whether a server of this machine shows a certificate that ``authority`` signed.

    Args:
        listen: The address that it listens on, or all of them (``0.0.0.0`` or ``::``).
        port: Its port.
        authority: Who signed its certificate, which is for ``localhost``, too.
        timeout: Longest wait for each step, in seconds.
    """
    try:
        trust = ssl.create_default_context(cafile=str(authority))
        with (
            socket.create_connection((_reached(listen), port), timeout=timeout) as connection,
            trust.wrap_socket(connection, server_hostname="localhost"),
        ):
            return True
    except OSError:  # those of TLS are among them
        return False


def _reached(listen: str) -> str:
    """Return an address at which this machine reaches what listens at ``listen``."""
    try:
        address = ipaddress.ip_address(listen)
    except ValueError:  # a name
        return listen
    if not address.is_unspecified:
        return listen
    return "127.0.0.1" if address.version == 4 else "::1"


_NO_PROXY = [("grpc.enable_http_proxy", 0)]
