"""Each thing that can stand between a site and its coordinator is told apart, and to whom."""

import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from dafne_federated.client.coordinator_check import check_coordinator
from dafne_federated.client.deployment_folder import Connection, SiteFolder, make_site
from dafne_federated.client.site_checks import Check, check_disk
from tests.stand_in.coordinator_stand_in import (
    UNKNOWN,
    connect_proxy,
    coordinator,
    write_certificate,
)

HOST = "localhost"
Make = Callable[..., SiteFolder]


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    return write_certificate(tmp_path / "coordinator.pem", HOST)


@pytest.fixture
def site(tmp_path: Path, squares_folder: Path, certificate: Path) -> Make:
    def make(port: int, host: str = HOST, authority: Path = certificate) -> SiteFolder:
        connection = Connection(coordinator=f"{host}:{port}")
        return make_site(tmp_path / "site", "clinic", connection, authority, squares_folder)

    return make


def checked(folder: SiteFolder) -> dict[str, Check]:
    return {check.name: check for check in check_coordinator(folder)}


def test_a_coordinator_that_knows_the_key_is_found_well(site: Make, certificate: Path) -> None:
    with coordinator(certificate) as there:
        found = checked(site(there.port))
    assert {check.status for check in found.values()} == {"ok"}
    assert found["proxy"].found == "none"
    assert found["certificate"].found.startswith("valid for 89 more days")
    assert found["key"].found == "registered with the coordinator"
    assert there.seen == ["POST /v1/fleet/activate-node HTTP/1.1"]


def test_a_key_that_is_not_registered_is_to_be_sent(site: Make, certificate: Path) -> None:
    with coordinator(certificate, UNKNOWN) as there:
        found = checked(site(there.port))
    assert (found["key"].status, found["clock"].status) == ("fail", "ok")
    assert "send clinic.request.json to the coordinator" in found["key"].advice


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("404 Not Found", "something other than a coordinator answers (HTTP 404)"),
        ("502 Bad Gateway", "the gateway answers, but nothing behind it"),
        ("401 Unauthorized", "not accepted"),
    ],
)
def test_other_answers_are_told_apart(
    site: Make, certificate: Path, status: str, words: str
) -> None:
    with coordinator(certificate, b"", status) as there:
        found = checked(site(there.port))
    assert (found["key"].status, found["key"].found) == ("fail", words)


@pytest.mark.parametrize(
    ("ahead", "expected"), [(0, "ok"), (-60, "fail"), (60, "warn"), (400, "fail")]
)
def test_the_clock_fails_where_flower_would_refuse(
    site: Make, certificate: Path, ahead: float, expected: str
) -> None:
    with coordinator(certificate, ahead=ahead) as there:
        assert checked(site(there.port))["clock"].status == expected


def test_nobody_who_listens_and_no_such_name(site: Make) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        folder = site(closed.getsockname()[1])
        reach = checked(folder)["reach"]
    assert (reach.status, "takes no connection" in reach.found) == ("fail", True)
    assert "ask the coordinator whether it runs" in reach.advice
    text = folder.settings_file.read_text().replace(f'"{HOST}:', '"nowhere.invalid:')
    folder.settings_file.write_text(text)
    reach = checked(folder)["reach"]
    assert (reach.status, "is not known here" in reach.found) == ("fail", True)


def test_a_foreign_certificate(site: Make, certificate: Path, tmp_path: Path) -> None:
    other = write_certificate(tmp_path / "other.pem", HOST)
    with coordinator(other) as there:
        reach = checked(site(there.port))["reach"]
    assert "not trusted: self-signed certificate" in reach.found
    assert "compare coordinator.crt with the coordinator by telephone" in reach.advice


@pytest.mark.parametrize(
    ("host", "days", "words", "advice"),
    [
        (HOST, -1, "expired", "tell the coordinator to renew"),
        ("else.where", 90, "mismatch", "under which name its certificate is valid"),
    ],
)
def test_a_certificate_that_does_not_hold(
    site: Make, tmp_path: Path, host: str, days: float, words: str, advice: str
) -> None:
    made = write_certificate(tmp_path / "made.pem", host, days)
    with coordinator(made) as there:
        found = checked(site(there.port, authority=made))
    assert list(found) == ["proxy", "reach"]
    assert words in found["reach"].found
    assert advice in found["reach"].advice


def test_a_certificate_that_ends_soon_is_told(site: Make, tmp_path: Path) -> None:
    made = write_certificate(tmp_path / "made.pem", HOST, 10)
    with coordinator(made) as there:
        assert checked(site(there.port, authority=made))["certificate"].status == "warn"


def test_the_check_and_flowers_own_client_go_through_the_proxy(
    site: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_certificate(tmp_path / "made.pem", "federation.test")
    with coordinator(made) as there, connect_proxy(there.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{proxy.port}")
        found = checked(site(9443, "federation.test", made))
        assert {check.status for check in found.values()} == {"ok"}
        assert found["proxy"].found == f"through 127.0.0.1:{proxy.port}"
        client = FleetHttpClient.from_server_address("federation.test:9443", False, str(made), [])
        with pytest.raises(httpx.HTTPStatusError, match="400 Bad Request"):
            client.ActivateNode(ActivateNodeRequest())
    assert proxy.seen == ["CONNECT federation.test:9443 HTTP/1.1"] * 2
    assert len(there.seen) == 2


def test_a_proxy_that_refuses_is_named(
    site: Make, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect_proxy(1, allows=False) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        reach = checked(site(9443, "federation.test"))["reach"]
    assert f"the proxy 127.0.0.1:{proxy.port}" in reach.found
    assert "let this machine out to federation.test:9443 by the proxy" in reach.advice


def test_a_disk_that_takes_nothing_fails_and_a_small_one_warns(tmp_path: Path) -> None:
    assert check_disk("disk", tmp_path / "not/yet", 1).status == "ok"
    small = check_disk("disk", tmp_path, 2**50)
    assert (small.status, "make room for" in small.advice) == ("warn", True)
    full = check_disk("disk", Path("/proc/self"), 1)
    assert (full.status, "cannot be written to" in full.found) == ("fail", True)
