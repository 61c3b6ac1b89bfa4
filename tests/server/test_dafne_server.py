"""What a Dafne server says of its models is understood, whichever of the two servers says it."""

from collections.abc import Callable
from typing import Any

import pytest
from dafne_stand_in import START, StandIn, digest

from dafne_federated.core.errors import ServerError, SettingsError
from dafne_federated.server.dafne_connection import DafneConnection
from dafne_federated.server.dafne_server import checked_name, list_models, model_versions

OLD, NEW = b"the first version", b"the second version"


@pytest.fixture(params=["php", "fastapi"])
def server(request: pytest.FixtureRequest, start_server: Callable[..., Any]) -> Any:
    stand_in, address = start_server(request.param)
    stand_in.models = {"Thigh": {str(START): OLD, str(START + 9): NEW}, "Leg": {}}
    return stand_in, address


def test_models_are_listed_and_other_files_of_the_folder_are_not(
    connection: DafneConnection,
) -> None:
    assert list_models(connection) == ["Leg", "Thigh"]


def test_versions_come_with_their_digests(stand_in: StandIn, connection: DafneConnection) -> None:
    stand_in.about["Thigh"] = {"model_name": "Thigh", "dimensionality": "2"}
    model = model_versions(connection, "Thigh")
    assert model.kind == stand_in.dialect
    assert model.versions == (START, START + 9)
    assert model.latest == START + 9
    assert model.digests == {START: digest(OLD), START + 9: digest(NEW)}
    assert model.size == (len(NEW) if stand_in.dialect == "php" else None)
    assert model.metadata == {"model_name": "Thigh", "dimensionality": "2"}
    assert model.unfinished == ()
    assert model.holding(digest(OLD)) == START
    assert model.holding(digest(b"other")) is None


def test_somebody_elses_upload_is_no_version(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.parts["Thigh_1.model"] = {0: b"a part"}
    model = model_versions(connection, "Thigh")
    assert model.latest == START + 9
    assert model.digests[model.latest] == digest(NEW)
    assert model.unfinished == ("chunks_Thigh_1",)
    assert model.size is None  # what is stated is not of a version


def test_a_model_without_versions_or_without_access_is_said(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    with pytest.raises(ServerError, match="refused with status 404"):
        model_versions(connection, "Leg")
    status = 403 if stand_in.dialect == "php" else 500
    with pytest.raises(ServerError, match=f"refused with status {status}"):
        model_versions(connection, "Nothing")


@pytest.mark.parametrize("server", ["php"], indirect=True)
def test_a_key_without_access_to_a_model_is_said(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.access = set()
    with pytest.raises(ServerError, match=r"status 403, the key has no access .*: access denied"):
        model_versions(connection, "Thigh")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "latest_timestamp: Field required"),
        ({"latest_timestamp": "1", "hashes": "x"}, "hashes: "),
        ({"latest_timestamp": "", "timestamps": []}, "has no version"),
        ({"latest_timestamp": "1", "timestamps": 3}, "timestamps: "),
        (["a list"], "reports a failure"),
        (b"<html>", "reports a failure: <html>"),
    ],
    ids=str,
)
def test_an_answer_of_another_kind_is_refused(
    stand_in: StandIn, connection: DafneConnection, answer: Any, words: str
) -> None:
    stand_in.answers["info_model"] = [(200, answer)]
    with pytest.raises(ServerError, match=words):
        model_versions(connection, "Thigh")


def test_numbers_for_texts_and_phps_empty_table_are_understood(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.answers["info_model"] = [
        (200, {"latest_timestamp": 7, "timestamps": [7, 3], "hashes": [], "hash": digest(OLD)})
    ]
    model = model_versions(connection, "Thigh")
    assert model.versions == (3, 7)
    assert model.digests == {7: digest(OLD)}


def test_a_list_of_models_that_is_none_is_refused(
    stand_in: StandIn, connection: DafneConnection
) -> None:
    stand_in.answers["get_available_models"] = [(200, {"models": "Thigh"})]
    with pytest.raises(ServerError, match="expected a list of models"):
        list_models(connection)


@pytest.mark.parametrize("name", ["Thigh", "Lower leg (left)", "Thigh-2"])
def test_names_that_servers_take(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["My_Model", "", "../Thigh", "Thigh\n", "Schenkel-ä", "a.b"])
def test_names_that_no_server_takes_are_not_sent(
    stand_in: StandIn, connection: DafneConnection, name: str
) -> None:
    with pytest.raises(SettingsError, match="no underscore"):
        model_versions(connection, name)
    assert stand_in.requests == []
