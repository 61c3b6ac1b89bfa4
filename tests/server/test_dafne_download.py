"""What was downloaded is what the server's digest names, however often the line broke."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import KEY, START, StandIn, digest
from pydantic import SecretStr

from dafne_federated.core.errors import ServerError
from dafne_federated.server.dafne_connection import DafneConnection, NoAnswerError
from dafne_federated.server.dafne_download import copy_model, pull
from dafne_federated.server.dafne_server import ModelVersions, model_versions

DATA = np.random.default_rng(1).bytes(300_000)
OLD = b"the first version"


@pytest.fixture(params=["php", "fastapi"])
def server(request: pytest.FixtureRequest, start_server: Callable[..., Any]) -> Any:
    stand_in, address = start_server(request.param)
    stand_in.models = {"Thigh": {str(START): OLD, str(START + 9): DATA}}
    return stand_in, address


@pytest.fixture
def model(connection: DafneConnection) -> ModelVersions:
    return model_versions(connection, "Thigh")


def test_the_newest_or_a_chosen_version_comes_whole(
    stand_in: StandIn, connection: DafneConnection, model: ModelVersions, own_home: Path
) -> None:
    told: list[tuple[int, int]] = []
    path = pull(connection, model, told=lambda *done: told.append(done))
    assert path.read_bytes() == DATA
    assert told[-1] == (len(DATA), len(DATA))
    assert pull(connection, model, START).read_bytes() == OLD
    assert {p.name for p in (own_home / "models").iterdir()} == {
        f"{digest(data)}.model" for data in (OLD, DATA)
    }
    # A whole number is answered with 500 and nothing: versions travel as text.
    assert [fields["timestamp"] for fields in stand_in.routes("get_model")] == [
        str(START + 9), str(START),
    ]  # fmt: skip


def test_what_is_there_is_not_downloaded_again(
    stand_in: StandIn, connection: DafneConnection, model: ModelVersions
) -> None:
    pull(connection, model)
    pull(connection, model)
    assert len(stand_in.routes("get_model")) == 1


def test_a_damaged_file_in_the_cache_is_noticed_and_replaced(
    stand_in: StandIn, connection: DafneConnection, model: ModelVersions
) -> None:
    path = pull(connection, model)
    path.write_bytes(DATA[:-1] + b"x")
    assert pull(connection, model).read_bytes() == DATA
    assert len(stand_in.routes("get_model")) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_is_continued(
    stand_in: StandIn, connection: DafneConnection, model: ModelVersions, ranges: bool
) -> None:
    stand_in.ranges = ranges
    stand_in.breaks = [100_000, 200_000]
    told: list[int] = []
    assert pull(connection, model, told=lambda done, _: told.append(done)).read_bytes() == DATA
    asked = [fields.get("range") for fields in stand_in.routes("get_model")]
    assert asked == [None, "bytes=100000-", "bytes=200000-"]
    assert (sorted(told) == told) == ranges  # a server without ranges begins anew


def test_another_process_continues_where_one_was_stopped(
    stand_in: StandIn, server: Any, model: ModelVersions
) -> None:
    stand_in.ranges = True
    stand_in.breaks = [250_000]
    first = DafneConnection(server[1], SecretStr(KEY), attempts=1)
    with first, pytest.raises(NoAnswerError, match="no answer"):
        pull(first, model)
    with DafneConnection(server[1], SecretStr(KEY)) as second:
        assert pull(second, model).read_bytes() == DATA
    asked = [fields.get("range") for fields in stand_in.routes("get_model")]
    assert asked == [None, "bytes=250000-"]


@pytest.mark.parametrize("kept", [b"other bytes", DATA + b"more", DATA])
def test_whatever_lies_in_the_partial_file_the_result_is_right(
    stand_in: StandIn,
    connection: DafneConnection,
    model: ModelVersions,
    own_home: Path,
    kept: bytes,
) -> None:
    stand_in.ranges = True
    (own_home / "models").mkdir(parents=True)
    (own_home / "models" / f"{digest(DATA)}.part").write_bytes(kept)
    assert pull(connection, model).read_bytes() == DATA


def test_one_damaged_download_is_repeated_two_are_an_error(
    stand_in: StandIn, connection: DafneConnection, model: ModelVersions, own_home: Path
) -> None:
    stand_in.damage = 1
    assert pull(connection, model).read_bytes() == DATA
    stand_in.damage = 2
    with pytest.raises(ServerError, match=f"arrived damaged twice: .* {digest(OLD)[:16]}, got"):
        pull(connection, model, START)
    assert [p.name for p in (own_home / "models").iterdir()] == [f"{digest(DATA)}.model"]


def test_a_server_that_contradicts_itself_is_not_believed(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    # Keys of model.json win over those of the server: an old table hides the true one.
    stand_in.about["Thigh"] = {"hashes": {str(START + 9): digest(OLD)}}
    model = model_versions(connection, "Thigh")
    words = "two digests" if stand_in.dialect == "php" else "arrived damaged twice"
    with pytest.raises(ServerError, match=words):
        pull(connection, model)


def test_without_a_digest_nothing_is_downloaded(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.about["Thigh"] = {"hashes": {}, "hash": ""}
    model = model_versions(connection, "Thigh")
    with pytest.raises(ServerError, match="states no SHA-256"):
        pull(connection, model)
    assert stand_in.routes("get_model") == []


def test_an_error_page_is_no_file(
    stand_in: StandIn, connection: DafneConnection, model: ModelVersions, own_home: Path
) -> None:
    stand_in.answers["get_model"] = [(200, {"message": "Fatal error: out of memory"})]
    with pytest.raises(ServerError, match=r"a message, not a file: Fatal error: out of memory"):
        pull(connection, model)
    assert list((own_home / "models").iterdir()) == []


def test_a_version_that_is_not_there_is_refused(
    connection: DafneConnection, model: ModelVersions
) -> None:
    with pytest.raises(ServerError, match=f"expected one of the versions {START}, {START + 9}"):
        pull(connection, model, 5)


def test_a_copy_is_whole_and_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    copy_model(tmp_path / "a", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == DATA
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b"]
