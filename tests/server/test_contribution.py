"""A contribution arrives whole with its digest, at either server, or the failure is said."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import START, StandIn, digest

from dafne_federated.core.errors import ServerError, VersionMovedError
from dafne_federated.server.dafne_connection import DafneConnection, NoAnswerError, RefusedError
from dafne_federated.server.publication import contribute, publish

BASE = b"the base"
OTHER = b"what somebody else published"
DATA = np.random.default_rng(2).bytes(100_000)
PART = 30_000  # bytes: four parts


@pytest.fixture(params=["php", "fastapi"])
def server(request: pytest.FixtureRequest, start_server: Callable[..., Any]) -> Any:
    stand_in, address = start_server(request.param)
    stand_in.models = {"Thigh": {str(START): BASE}}
    stand_in.may_merge = {"Thigh"}
    return stand_in, address


def test_a_contribution_arrives_whole_with_its_digest_and_dice(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    contribute(connection, "Thigh", DATA, digest(BASE), 0.875, None, PART, 0.0)
    ((name, _, dice, data),) = stand_in.pending
    assert (name, float(dice), data) == ("Thigh", 0.875, DATA)
    sent = stand_in.routes("upload_model")
    assert len(sent) == (4 if stand_in.dialect == "php" else 1)  # the older one cannot join parts
    for fields in sent:
        assert fields["original_hash"] == fields["hash"] == digest(DATA)
    assert stand_in.newest("Thigh") == BASE


def test_a_contribution_to_a_moved_version_is_not_sent(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.models["Thigh"][str(START + 5)] = OTHER
    with pytest.raises(VersionMovedError):
        contribute(connection, "Thigh", DATA, digest(BASE), pause=0.0)
    assert stand_in.pending == []


@pytest.mark.parametrize("server", ["fastapi"], indirect=True)
def test_a_failure_that_is_told_with_status_200_is_a_failure(
    stand_in: StandIn, connection: DafneConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = stand_in._fastapi_upload_model
    monkeypatch.setattr(
        stand_in, "_fastapi_upload_model", lambda fields, file, r: receive(fields, file[:-1], r)
    )
    with pytest.raises(RefusedError, match=r"reports a failure: .*Communication error"):
        contribute(connection, "Thigh", DATA, digest(BASE), pause=0.0)


@pytest.mark.parametrize("server", ["fastapi"], indirect=True)
def test_the_older_server_takes_no_canonical_version(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    with pytest.raises(ServerError, match="takes contributions only"):
        publish(connection, "Thigh", DATA, digest(BASE))
    assert stand_in.routes("upload_merged_model") == []


@pytest.mark.parametrize("server", ["php"], indirect=True)
def test_a_contribution_that_may_have_arrived_is_not_sent_twice(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.lost = 1
    with pytest.raises(ServerError, match="may have the whole contribution or not") as caught:
        contribute(connection, "Thigh", DATA, digest(BASE), pause=0.0)
    assert not isinstance(caught.value, NoAnswerError)
    assert len(stand_in.pending) == 1


@pytest.mark.parametrize("server", ["php"], indirect=True)
def test_a_contribution_without_measurement_says_so_as_dafne_does(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    contribute(connection, "Thigh", DATA, digest(BASE), pause=0.0)
    assert float(stand_in.routes("upload_model")[0]["dice"]) == -1
