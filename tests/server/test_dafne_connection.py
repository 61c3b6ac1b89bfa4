"""The key travels only where it should, and failures end in words that do not hold it."""

import logging
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from dafne_stand_in import KEY, START
from pydantic import SecretStr

from dafne_federated.core.errors import ServerError, SettingsError
from dafne_federated.server.dafne_connection import (
    DafneConnection,
    NoAnswerError,
    RefusedError,
    server_address,
)


def connect(address: str, attempts: int = 3) -> DafneConnection:
    return DafneConnection(address, SecretStr(KEY), attempts, first_pause=0.01, seconds=5)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("https://dafne.example.org/api", "https://dafne.example.org/api/"),
        ("https://dafne.example.org/api/", "https://dafne.example.org/api/"),
        ("http://127.0.0.1:8000/api/", "http://127.0.0.1:8000/api/"),
        ("http://localhost/", "http://localhost/"),
        ("http://[::1]:80/api", "http://[::1]/api/"),
    ],
)
def test_addresses_that_may_be_used(given: str, want: str) -> None:
    assert server_address(given) == want


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("http://dafne.example.org/api/", "expected https"),
        ("http://127.0.0.1.example.org/", "expected https"),
        ("http://192.168.1.1/", "expected https"),
        ("ftp://example.org", "expected an address such as"),
        ("dafne.example.org", "expected an address such as"),
        ("https://", "expected an address such as"),
        ("", "expected an address such as"),
    ],
)
def test_the_key_travels_openly_only_within_this_machine(given: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        server_address(given)


@pytest.mark.parametrize("given", [f"https://me:{KEY}@x.org/", f"https://x.org/?api_key={KEY}"])
def test_an_address_with_a_key_in_it_is_refused_without_repeating_it(given: str) -> None:
    with pytest.raises(SettingsError, match="without user, password and query") as caught:
        server_address(given)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(start_server: Callable[..., Any], status: int) -> None:
    stand_in, address = start_server()
    stand_in.answers["get_available_models"] = [(status, {"message": "later"})] * 2
    with connect(address) as connection:
        assert connection.ask("get_available_models") == {"models": []}
    assert len(stand_in.routes("get_available_models")) == 3


def test_a_no_is_not_asked_again(start_server: Callable[..., Any]) -> None:
    stand_in, address = start_server()
    stand_in.answers["info_model"] = [(500, {"message": "Model\nnot found"})]
    with (
        connect(address) as connection,
        pytest.raises(RefusedError, match=r"status 500, .*: Model not found"),
    ):
        connection.ask("info_model")
    assert len(stand_in.requests) == 1


def test_a_server_that_stays_busy_or_is_not_there_is_given_up(
    start_server: Callable[..., Any],
) -> None:
    stand_in, address = start_server()
    stand_in.answers["info_model"] = [(503, {})] * 9
    with connect(address) as connection, pytest.raises(NoAnswerError, match="busy"):
        connection.ask("info_model")
    assert len(stand_in.requests) == 3
    with connect("http://127.0.0.1:9/") as connection, pytest.raises(NoAnswerError) as caught:
        connection.ask("info_model")
    assert caught.value.unsent
    assert "no answer" in str(caught.value)


def test_the_key_does_not_follow_a_redirection(start_server: Callable[..., Any]) -> None:
    other, elsewhere = start_server()
    stand_in, address = start_server()
    stand_in.answers["info_model"] = [(308, {"Location": f"{elsewhere}info_model"})]
    with connect(address) as connection, pytest.raises(RefusedError, match=r"points to .*; give"):
        connection.ask("info_model")
    assert other.requests == []


def test_the_servers_clock_is_known(start_server: Callable[..., Any]) -> None:
    stand_in, address = start_server()
    stand_in.models = {"Thigh": {str(START): b"x"}}
    with connect(address) as connection:
        connection.ask("info_model", model_type="Thigh")
        assert connection.clock == START + 1001


def stream(connection: DafneConnection) -> None:
    with connection.receive("any", 0, model_type="Thigh"):
        pass


CALLS: dict[str, Callable[[DafneConnection], Any]] = {
    "ask": lambda connection: connection.ask("any", model_type="Thigh"),
    "send": lambda connection: connection.send("any", b"part", "name.part", sha256="0"),
    "receive": stream,
}
ECHOES: list[tuple[int, Any]] = [
    (200, [{"message": f"failed for {KEY}"}, 500]),
    (200, KEY.encode()),
    (401, {"message": f"unknown key {KEY}"}),
    (404, f"no {KEY}".encode()),
    (422, {"detail": [{"msg": "Input should be a valid string", "input": {"api_key": KEY}}]}),
    (500, b""),
    (503, {"message": KEY}),
    (302, {"Location": f"https://example.org/?api_key={KEY}"}),
]


@pytest.mark.parametrize(
    ("way", "status", "content"),
    # With status 200, a stream is a file, whatever it holds.
    [(way, *echo) for way in CALLS for echo in ECHOES if (way, echo[0]) != ("receive", 200)],
    ids=lambda value: str(value)[:20],
)
def test_the_key_is_in_no_message_log_or_traceback_whatever_fails(
    start_server: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    way: str,
    status: int,
    content: Any,
) -> None:
    caplog.set_level(logging.DEBUG)
    stand_in, address = start_server()
    stand_in.answers["any"] = [(status, content)] * 3

    with connect(address) as connection, pytest.raises(ServerError) as caught:
        CALLS[way](connection)
    assert KEY not in told(caught.value) + caplog.text
    assert stand_in.requests[0][1]["api_key"] == KEY


def test_a_key_with_quotes_is_cut_out_of_a_list_too(start_server: Callable[..., Any]) -> None:
    odd = 'ab"cd\\ef'
    stand_in, address = start_server()
    stand_in.answers["any"] = [(422, [f"no such key {odd}"])]
    with (
        DafneConnection(address, SecretStr(odd), attempts=1) as connection,
        pytest.raises(ServerError, match=r"no such key \*\*\*"),
    ):
        CALLS[next(iter(CALLS))](connection)


@pytest.mark.parametrize("way", CALLS)
def test_the_key_is_in_no_traceback_when_the_server_is_gone(
    caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with connect("http://127.0.0.1:9/") as connection, pytest.raises(NoAnswerError) as caught:
        CALLS[way](connection)
    assert KEY not in told(caught.value) + caplog.text


def told(error: BaseException) -> str:
    """Return a traceback with all that it can show, the values of variables included."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    for frame in shown.stack:
        if frame.filename == __file__:
            frame.locals = None  # a test knows the key
    return "".join(shown.format())


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a hospital")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def test_a_certificate_counts_only_from_an_authority_that_is_named(
    start_server: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate(tmp_path)
    stand_in, address = start_server(ssl_certfile=str(cert), ssl_keyfile=str(key))
    with connect(address) as connection, pytest.raises(RefusedError, match="SSL_CERT_FILE"):
        connection.ask("get_available_models")
    assert stand_in.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    with connect(address) as connection:
        assert connection.ask("get_available_models") == {"models": []}
