"""A push ends with the sent bytes as the newest version, or leaves the newest one as it was."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import KEY, START, StandIn, digest

from dafne_federated.core.errors import ServerError, VersionMovedError
from dafne_federated.server import publication
from dafne_federated.server.dafne_connection import DafneConnection, RefusedError
from dafne_federated.server.dafne_server import model_versions
from dafne_federated.server.publication import PAUSE, Published, publish

BASE = b"the base"
OTHER = b"what somebody else published"
DATA = np.random.default_rng(2).bytes(100_000)
PART = 30_000  # bytes: four parts
QUICK = {"part_bytes": PART, "pause": 0.0}  # the stand-in's clock moves by itself


@pytest.fixture(params=["php"])
def server(request: pytest.FixtureRequest, start_server: Callable[..., Any]) -> Any:
    stand_in, address = start_server(request.param)
    stand_in.models = {"Thigh": {str(START): BASE}}
    stand_in.may_merge = {"Thigh"}
    return stand_in, address


def publish_data(connection: DafneConnection, **options: Any) -> Published:
    return publish(connection, "Thigh", DATA, digest(BASE), **{**QUICK, **options})


def on(stand_in: StandIn, route: str, number: int, act: Callable[[], Any]) -> None:
    """Let ``act`` happen at the ``number``-th request to ``route``, before it is answered."""

    def before(asked: str, _: dict[str, Any]) -> None:
        if asked == route and len(stand_in.routes(route)) == number:
            act()

    stand_in.before = before


@pytest.mark.parametrize("part_bytes", [10, PART, len(DATA), len(DATA) + 1])
def test_what_is_sent_becomes_the_newest_version(
    stand_in: StandIn, connection: DafneConnection, part_bytes: int
) -> None:
    data = DATA[:45] if part_bytes == 10 else DATA
    told: list[tuple[int, int]] = []
    done = publish(
        connection, "Thigh", data, digest(BASE), lambda *t: told.append(t), part_bytes, 0.0
    )
    assert stand_in.newest("Thigh") == data
    assert stand_in.models["Thigh"][str(START)] == BASE
    assert done == Published("Thigh", int(max(stand_in.models["Thigh"])), digest(data), ())
    assert told == sorted(told)
    assert told[-1] == (len(data), len(data))
    assert model_versions(connection, "Thigh").latest == done.version


def test_while_parts_travel_every_client_still_sees_the_base(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    seen = []
    on(
        stand_in,
        "upload_merged_model",
        3,
        lambda: seen.append(stand_in._info_model({"model_type": "Thigh"})),
    )
    publish_data(connection)
    assert f'"latest_timestamp":"{START}"'.encode() in seen[0].body
    assert digest(BASE).encode() in seen[0].body
    sent = stand_in.routes("upload_merged_model")
    assert len({fields["filename"] for fields in sent}) == 1
    assert not any(
        fields[name].endswith(".model") for fields in sent for name in ("filename", "sent name")
    )


def test_a_moved_version_is_not_overwritten(stand_in: StandIn, connection: DafneConnection) -> None:
    stand_in.models["Thigh"][str(START + 5)] = OTHER
    with pytest.raises(VersionMovedError, match=r"Pull it, run again .* gate again") as caught:
        publish_data(connection)
    assert (caught.value.base, caught.value.latest) == (START, START + 5)
    assert stand_in.newest("Thigh") == OTHER
    assert stand_in.routes("upload_merged_model") == []


def test_a_version_that_comes_while_parts_travel_is_not_overwritten(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    def other() -> None:
        stand_in.models["Thigh"][str(START + 5)] = OTHER

    on(stand_in, "upload_merged_model", 3, other)
    with pytest.raises(VersionMovedError, match="would be lost"):
        publish_data(connection)
    assert stand_in.newest("Thigh") == OTHER
    assert len(stand_in.routes("upload_merged_model")) == 3  # the last part was kept back


def test_a_base_that_the_server_never_had_is_refused(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    with pytest.raises(VersionMovedError, match="no version with the digest of the base") as caught:
        publish(connection, "Thigh", DATA, digest(b"elsewhere"), **QUICK)
    assert caught.value.base is None
    assert stand_in.newest("Thigh") == BASE


def test_a_version_of_the_same_moment_is_told(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    def other() -> None:
        stand_in.models["Thigh"][str(stand_in.clock())] = OTHER

    on(stand_in, "upload_merged_model", 4, other)  # after the last look, before the last part
    done = publish_data(connection)
    assert stand_in.newest("Thigh") == DATA
    assert len(done.beside) == 1
    assert stand_in.models["Thigh"][str(done.beside[0])] == OTHER


def test_an_upload_that_has_not_ended_hides_the_newest_version(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.parts["Thigh.model"] = {0: b"x"}
    with pytest.raises(ServerError, match="an upload on the server has not ended"):
        publish_data(connection)
    assert stand_in.routes("upload_merged_model") == []


def test_overwriting_in_the_same_second_is_noticed(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    def overwritten() -> None:
        stand_in.models["Thigh"] = {
            stamp: OTHER if data == DATA else data
            for stamp, data in stand_in.models["Thigh"].items()
        }

    on(stand_in, "info_model", 3, overwritten)
    with pytest.raises(ServerError, match="is not what was sent"):
        publish_data(connection)


def test_two_versions_never_fall_into_one_second(
    stand_in: StandIn, connection: DafneConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(stand_in, "clock", lambda: stand_in._now)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        stand_in._now += int(seconds)

    monkeypatch.setattr(publication.time, "sleep", sleep)
    stand_in.models["Thigh"] = {str(stand_in._now): BASE}
    publish_data(connection, pause=PAUSE)
    assert len(stand_in.models["Thigh"]) == 2
    assert stand_in.newest("Thigh") == DATA
    assert slept == [PAUSE, PAUSE]  # before: past the base; after: an overwriting one would show


def test_a_version_from_the_future_would_hide_the_new_one(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.models["Thigh"] = {str(START + 900_000): BASE}
    with pytest.raises(ServerError, match="ahead of the server's clock"):
        publish_data(connection)
    assert stand_in.newest("Thigh") == BASE


@pytest.mark.parametrize("part_bytes", [PART, len(DATA)])
def test_an_answer_that_is_lost_makes_no_second_version(
    stand_in: StandIn, connection: DafneConnection, part_bytes: int
) -> None:
    number = 4 if part_bytes == PART else 1
    on(stand_in, "upload_merged_model", number, lambda: setattr(stand_in, "lost", 1))
    publish_data(connection, part_bytes=part_bytes)
    assert len(stand_in.models["Thigh"]) == 2
    assert stand_in.newest("Thigh") == DATA


def test_a_part_that_is_used_up_while_its_answer_is_lost_is_no_failure(
    stand_in: StandIn, connection: DafneConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file appears only after the next look, as when putting it together takes long.
    kept: dict[str, bytes] = {}
    looks = iter(range(99))
    info = stand_in._info_model

    def late(fields: dict[str, Any], *rest: Any) -> Any:
        if next(looks) == 3:
            stand_in.models["Thigh"].update(kept)
        return info(fields, *rest)

    def hide() -> None:
        (new,) = (v for v, data in stand_in.models["Thigh"].items() if data == DATA)
        kept[new] = stand_in.models["Thigh"].pop(new)

    monkeypatch.setattr(stand_in, "_info_model", late)
    upload = stand_in._php_upload_merged_model

    def slow(fields: dict[str, Any], file: bytes, rest: Any) -> Any:
        answer = upload(fields, file, rest)
        if fields["chunk_index"] == "3" and not kept:
            hide()
            stand_in.lost = 1
        return answer

    monkeypatch.setattr(stand_in, "_php_upload_merged_model", slow)
    done = publish_data(connection)
    assert len(stand_in.routes("upload_merged_model")) == 5  # the last part was refused once
    assert (stand_in.newest("Thigh"), done.digest) == (DATA, digest(DATA))


def test_a_model_json_that_hides_the_true_versions_is_noticed(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.about["Thigh"] = {
        "latest_timestamp": str(START), "timestamps": [str(START)],
        "hashes": {str(START): digest(BASE)},
    }  # fmt: skip
    with pytest.raises(ServerError, match=r"not what was sent: .* model\.json holds versions"):
        publish_data(connection)


def test_parts_that_a_busy_server_turns_away_are_sent_again(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.answers["upload_merged_model"] = [(503, {}), (502, {})]
    publish_data(connection)
    assert stand_in.newest("Thigh") == DATA
    assert len(stand_in.routes("upload_merged_model")) == 6


def test_publishing_twice_is_publishing_once(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    first = publish_data(connection)
    assert publish_data(connection) == first
    assert len(stand_in.models["Thigh"]) == 2


def test_an_older_version_can_be_published_again(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    publish_data(connection)
    publish(connection, "Thigh", BASE, digest(DATA), **QUICK)
    assert stand_in.newest("Thigh") == BASE
    assert len(stand_in.models["Thigh"]) == 3


def test_without_the_merge_permission_nothing_changes(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.may_merge = set()
    with pytest.raises(
        RefusedError, match=r"status 401, .* lacks the merge permission .*invalid access code"
    ):
        publish_data(connection)
    assert stand_in.newest("Thigh") == BASE


def test_damage_on_the_way_leaves_the_newest_version(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    def damage() -> None:
        (parts,) = stand_in.parts.values()
        parts[0] = b"damaged"

    on(stand_in, "upload_merged_model", 4, damage)
    with pytest.raises(RefusedError, match=r"422, .*: SHA-256 checksum mismatch"):
        publish_data(connection)
    assert stand_in.newest("Thigh") == BASE
    stand_in.before = lambda *_: None
    publish_data(connection)  # and nothing of it is left behind
    assert stand_in.newest("Thigh") == DATA


KILLED = """
import sys
from pydantic import SecretStr
from dafne_federated.server.dafne_connection import DafneConnection
from dafne_federated.server.publication import publish
address, key, base, file = sys.argv[1:]
publish(DafneConnection(address, SecretStr(key)), "Thigh", open(file, "rb").read(), base,
        part_bytes=30_000, pause=0.0)
"""


@pytest.fixture
def killed(server: Any, tmp_path: Path) -> StandIn:
    """A server to which a process was sending; it was killed while its third part travelled."""
    stand_in, address = server
    (tmp_path / "file").write_bytes(DATA)
    third = threading.Event()
    gone = threading.Event()

    def before() -> None:
        third.set()
        gone.wait(30)

    on(stand_in, "upload_merged_model", 3, before)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, address, KEY, digest(BASE), str(tmp_path / "file")],
        stderr=subprocess.PIPE,
    )
    assert third.wait(60), process.communicate()[1]
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    gone.set()
    stand_in.before = lambda *_: None
    return stand_in


def test_a_killed_upload_leaves_the_newest_version_and_is_continued(
    killed: StandIn, connection: DafneConnection, own_home: Path
) -> None:
    now = model_versions(connection, "Thigh")
    assert (now.latest, now.digests[START], now.unfinished) == (START, digest(BASE), ())
    before = len(killed.requests)
    done = publish_data(connection)
    sent = [f["chunk_index"] for r, f in killed.requests[before:] if r == "upload_merged_model"]
    assert sent == ["2", "3"]
    assert killed.newest("Thigh") == DATA
    assert done.digest == digest(DATA)
    assert list((own_home / "uploads").iterdir()) == []


def test_a_killed_upload_whose_parts_were_cleared_away_begins_anew(
    killed: StandIn, connection: DafneConnection
) -> None:
    killed.parts.clear()
    publish_data(connection)
    assert killed.newest("Thigh") == DATA


def test_a_killed_upload_is_not_continued_past_a_moved_version(
    killed: StandIn, connection: DafneConnection
) -> None:
    killed.models["Thigh"][str(START + 5)] = OTHER
    with pytest.raises(VersionMovedError):
        publish_data(connection)
    assert killed.newest("Thigh") == OTHER
