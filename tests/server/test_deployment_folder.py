"""The folder of a coordinator is private, is made once, and says what does not fit."""

import stat
from pathlib import Path

import pytest
from cryptography import x509

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.certificates import days_left, host_names
from dafne_federated.server.deployment_folder import (
    ServerFolder,
    ServerSettings,
    make_server,
    signing_key,
)

CHOSEN = ServerSettings(hosts=("federation.example.org", "10.0.0.7"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_making_it_twice_changes_nothing(tmp_path: Path) -> None:
    first = make_server(tmp_path / "c", CHOSEN)
    before = contents(first.path)
    make_server(tmp_path / "c", CHOSEN)
    assert contents(first.path) == before
    assert ServerFolder(tmp_path / "c").settings == CHOSEN


def test_only_its_owner_can_look_into_it(tmp_path: Path) -> None:
    folder = make_server(tmp_path / "c", CHOSEN)
    paths = [folder.path, *folder.path.rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}
    for path in (folder.authority_key, folder.key, folder.secret, folder.settings_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_certificate_is_signed_for_all_names_and_this_machine(tmp_path: Path) -> None:
    folder = make_server(tmp_path / "c", CHOSEN)
    names = host_names(folder.certificate)
    assert names == ["federation.example.org", "10.0.0.7", "localhost", "127.0.0.1"]
    certificate, authority = (
        x509.load_pem_x509_certificate(path.read_bytes())
        for path in (folder.certificate, folder.authority)
    )
    certificate.verify_directly_issued_by(authority)  # raises unless it is so
    assert days_left(folder.certificate) in (824, 825)


def test_a_certificate_that_was_removed_is_made_again_by_the_same_authority(
    tmp_path: Path,
) -> None:
    folder = make_server(tmp_path / "c", CHOSEN)
    authority, old = folder.authority.read_bytes(), folder.certificate.read_bytes()
    folder.certificate.unlink()
    with pytest.raises(SettingsError, match=r"server\.key is there without .*server\.crt"):
        make_server(tmp_path / "c", CHOSEN)
    folder.key.unlink()
    make_server(tmp_path / "c", CHOSEN)
    assert folder.authority.read_bytes() == authority
    assert folder.certificate.read_bytes() != old


def test_another_name_needs_another_certificate(tmp_path: Path) -> None:
    folder = make_server(tmp_path / "c", CHOSEN)
    more = ServerSettings(hosts=("new.example.org",))
    with pytest.raises(SettingsError, match=r"add new\.example\.org to 'hosts'"):
        make_server(tmp_path / "c", more)
    text = folder.settings_file.read_text()
    folder.settings_file.write_text(text.replace('["', '["new.example.org", "'))
    with pytest.raises(SettingsError, match=r"not for new\.example\.org; remove it and its key"):
        make_server(tmp_path / "c", more)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hosts = []", "hosts: .*at least 1"),
        ('hosts = ["a"]\nports = 3', "ports: Extra"),
        ('hosts = ["a"]\nport = 0', "port: .*greater than or equal to 1"),
        ("hosts", "server.toml: "),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "server.toml").write_text(text)
    with pytest.raises(SettingsError, match=words):
        _ = ServerFolder(tmp_path).settings


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not found; make it with 'dafne-federated server"):
        _ = ServerFolder(tmp_path).settings
    with pytest.raises(SettingsError, match="expected the name of a run"):
        ServerFolder(tmp_path).run_path("../other")


def test_a_version_is_signed_by_the_coordinator_that_it_lies_in(tmp_path: Path) -> None:
    folder = make_server(tmp_path / "c", CHOSEN)
    for path in (folder.runs / "thigh", folder.runs / "thigh" / "versions" / "0002"):
        assert signing_key(RunFolder(path)) == folder.release_key
    assert signing_key(RunFolder(tmp_path / "simulated" / "versions" / "0002")) is None
