"""Whether a program of Flower is up: it answers the health protocol of gRPC on this machine."""

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


_NO_PROXY = [("grpc.enable_http_proxy", 0)]
