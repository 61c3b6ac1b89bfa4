"""Versions that count are compared as far as they count, and a difference is told in words."""

import pytest
from flwr.app import ConfigRecord, RecordDict

from dafne_federated.core.handshake import (
    difference,
    fingerprint,
    own_versions,
    versions_said,
    with_protocol,
)

OWN = with_protocol(own_versions())


def test_each_side_fits_itself_and_its_name_in_files_is_one_word() -> None:
    assert difference(OWN, OWN) == ""
    assert OWN["protocol"] == "1"
    assert fingerprint().count("/") == 0 == fingerprint().count(" ")


@pytest.mark.parametrize("field", ["flower", "keras", "tensorflow"])
def test_of_what_results_depend_on_the_first_two_numbers_count(field: str) -> None:
    here, repaired, other = (OWN | {field: value} for value in ("3.4.5", "3.4.6rc1", "3.5.5"))
    assert difference(here, repaired) == ""
    assert "3.4.5 at this site and 3.5.5 at the coordinator" in difference(here, other)
    assert "install those of the coordinator" in difference(here, other)


@pytest.mark.parametrize("field", ["protocol", "software"])
def test_protocol_and_package_must_be_the_same(field: str) -> None:
    here, other = (OWN | {field: value} for value in ("3.4.5", "3.4.6"))
    assert "3.4.5 at this site and 3.4.6 at the coordinator" in difference(here, other)


def test_versions_are_read_whatever_else_a_message_holds() -> None:
    record = {"protocol": 9, "keras": "k" * 99, "flower": 7, "unknown": "x"}
    content = RecordDict({"message": ConfigRecord(record), "more": ConfigRecord({})})
    assert versions_said(content) == {
        "protocol": "9",
        "software": "not said",
        "flower": "7",
        "keras": "k" * 40,
        "tensorflow": "not said",
    }
    assert versions_said(RecordDict({})) is None
