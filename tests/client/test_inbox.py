"""Bases that wait are kept whole, privately, and never too many of them."""

import stat
from pathlib import Path

import pytest

from dafne_federated.client.inbox import Inbox
from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.files import sha256


def test_what_was_kept_is_there_until_it_is_removed(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox")
    assert inbox.digests() == []
    inbox.keep(b"base")
    digest = sha256(b"base")
    assert (inbox.digests(), inbox.bytes(digest)) == ([digest], b"base")
    (path,) = inbox.folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    inbox.remove(digest)
    inbox.remove(digest)
    assert not inbox.has(digest)


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox")
    for number in range(7):
        inbox.keep(bytes([number]))
    assert inbox.digests() == [sha256(bytes([number])) for number in (6, 5, 4, 3)]


def test_a_damaged_one_is_not_there(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox")
    inbox.keep(b"base")
    (path,) = inbox.folder.iterdir()
    path.write_bytes(b"other")
    assert not inbox.has(sha256(b"base"))
    with pytest.raises(ModelFileError, match=r"no base .* waits"):
        inbox.bytes(sha256(b"base"))
