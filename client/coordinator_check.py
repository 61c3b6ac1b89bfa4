"""Whether a site can reach its coordinator: one request as Flower's own node would send it.

Flower 1.41 speaks HTTPS to the coordinator through httpx, which goes through the proxy that
``HTTPS_PROXY`` names unless ``NO_PROXY`` has the host. The same library, certificate and key are
used here, so that what is found holds for the node. gRPC is spoken on this machine alone.

The request would activate the node, with a heartbeat that no coordinator accepts: it looks for
the key first, so that the answer tells whether the key is registered, and nothing changes.
"""

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.request import getproxies, proxy_bypass

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from dafne_federated.client.deployment_folder import SiteFolder
from dafne_federated.client.site_checks import Check, failed, fine, warned

_PATH = "/v1/fleet/activate-node"
_TIMEOUT = 20.0  # seconds
_SOON = 30  # days before a certificate ends
# Flower's coordinator refuses a node whose clock is this far ahead of its own, in seconds, or
# 305 s behind. Source: TIMESTAMP_TOLERANCE and SYSTEM_TIME_TOLERANCE of Flower 1.41.
_AHEAD, _BEHIND = 5.0, 305.0


def check_coordinator(folder: SiteFolder) -> Iterator[Check]:
    """Yield what is found on the way to the coordinator; it ends where the way ends."""
    address = folder.connection.coordinator
    proxy = _proxy(address)
    yield fine("proxy", f"through {proxy}" if proxy else "none")
    before = datetime.now(UTC)
    try:
        context = ssl.create_default_context(cafile=str(folder.coordinator))
        with httpx.Client(verify=context, timeout=_TIMEOUT) as client:
            answer, ends = _ask(client, f"https://{address}{_PATH}", folder)
    except (httpx.HTTPError, OSError, ValueError) as error:
        yield _unreachable(error, address, proxy)
        return
    yield fine("reach", f"{address} answers, and it is the coordinator of the certificate")
    yield _certificate(ends)
    clock = _clock(answer, before + (datetime.now(UTC) - before) / 2)
    yield clock
    yield _key(answer, clock, folder)


def _ask(client: httpx.Client, url: str, folder: SiteFolder) -> tuple[httpx.Response, str]:
    private = serialization.load_ssh_private_key(folder.key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        msg = "the site's key is of another kind"
        raise ValueError(msg)
    public = private.public_key()
    message = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0.0)
    kind = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    request = client.build_request("POST", url, content=message.SerializeToString(), headers=kind)
    ends = ""

    def send(context: ProtobufRequestContext) -> httpx.Response:
        nonlocal ends
        answer = client.send(context.request, stream=True)
        secured = answer.extensions["network_stream"].get_extra_info("ssl_object")
        ends = str(secured.getpeercert()["notAfter"])
        answer.read()
        return answer

    called = ProtobufRequestContext("/flwr.proto.Fleet/ActivateNode", message, request)
    return NodeAuthHttpInterceptor(private, public).intercept(called, send), ends


def _unreachable(error: BaseException, address: str, proxy: str) -> Check:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    where = f"{proxy} (the proxy)" if proxy else address
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _distrusted(cause, address)
        if isinstance(cause, socket.gaierror):
            who = "the address in [connection] of site.toml, and DNS with your network's people"
            return failed("reach", f"the name of {where} is not known here", f"check {who}")
    if isinstance(error, httpx.ProxyError) or (proxy and isinstance(error, httpx.ConnectError)):
        advice = f"ask your network's people to let this machine out to {address} by the proxy"
        return failed("reach", f"the proxy {proxy} did not let through: {error}", advice)
    if isinstance(error, httpx.TimeoutException):
        advice = f"ask your network's people to allow TCP outwards to {address}"
        return failed("reach", f"no answer of {where} within {_TIMEOUT:g} s", advice)
    if isinstance(error, httpx.ConnectError):
        advice = (
            "ask the coordinator whether it runs, and your network's people whether TCP outwards "
            f"to {address} is allowed"
        )
        return failed("reach", f"{where} takes no connection: {error}", advice)
    if isinstance(error, httpx.HTTPError):
        advice = "ask the coordinator whether its gateway runs, and what stands in between"
        return failed("reach", f"{where} broke off: {type(error).__name__} {error}", advice)
    advice = "restore coordinator.crt and keys/site.key, or make them with 'site init'"
    return failed("reach", f"the certificate or the key here cannot be used: {error}", advice)


def _distrusted(error: ssl.SSLCertVerificationError, address: str) -> Check:
    words = str(error.verify_message)
    if "expired" in words or "not yet valid" in words:
        advice = "if this machine's clock is right, tell the coordinator to renew its certificate"
    elif "mismatch" in words or "not valid for" in words:
        advice = f"ask the coordinator under which name its certificate is valid, not {address}"
    else:
        advice = (
            "compare coordinator.crt with the coordinator by telephone; if it is theirs, something "
            "between you opens TLS: ask your network's people to exempt this address"
        )
    return failed("reach", f"{address} has a certificate that is not trusted: {words}", advice)


def _certificate(ends: str) -> Check:
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
    days = (end - datetime.now(UTC)).days
    found = f"valid for {days} more days, until {end:%Y-%m-%d}"
    if days < _SOON:
        return warned("certificate", found, "tell the coordinator to renew it")
    return fine("certificate", found)


def _clock(answer: httpx.Response, now: datetime) -> Check:
    try:
        # Twice where a gateway and what is behind it both tell theirs.
        theirs = parsedate_to_datetime(answer.headers.get_list("date")[0]).replace(tzinfo=UTC)
    except (IndexError, ValueError):
        advice = "see that this machine takes its time from a time server"
        return warned("clock", "the coordinator does not tell its time", advice)
    ahead = (now - theirs).total_seconds()  # the header has whole seconds
    found = f"{ahead:+.0f} s against the coordinator's"
    if not -_BEHIND < ahead < _AHEAD:
        advice = "set this machine's clock by a time server; if it is right, tell the coordinator"
        return failed("clock", found, advice)
    if abs(ahead) > _AHEAD:
        return warned("clock", found, "see that both machines take their time from a time server")
    return fine("clock", found)


def _key(answer: httpx.Response, clock: Check, folder: SiteFolder) -> Check:
    try:
        code = int(answer.json()["code"])
    except (ValueError, KeyError, TypeError):
        code = 0
    if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return fine("key", "registered with the coordinator")
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        request = folder.request_file(folder.settings.name).name
        advice = f"send {request} to the coordinator, and ask whether the site was revoked"
        return failed("key", "not registered with the coordinator", advice)
    status = answer.status_code
    if status == httpx.codes.UNAUTHORIZED:
        why = "" if clock.status == "ok" else ", most likely because of the clock"
        return failed("key", f"not accepted{why}", "tell the coordinator, with this line")
    if status in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE):
        return failed("key", "the gateway answers, but nothing behind it", "tell the coordinator")
    advice = f"check the address in [connection] of site.toml: HTTP {status} is not of a gateway"
    return failed("key", f"something other than a coordinator answers (HTTP {status})", advice)


def _proxy(address: str) -> str:
    """Return the proxy, without a password in it, or nothing."""
    host = address.rpartition(":")[0]
    found = getproxies().get("https") or getproxies().get("all") or ""
    return "" if proxy_bypass(host) else found.rpartition("://")[2].rpartition("@")[2].rstrip("/")
