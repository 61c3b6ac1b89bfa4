"""The folder of a site is private, is made once, and its settings are those that sites run by."""

import stat
from pathlib import Path

import pytest

from dafne_federated.client.deployment_folder import (
    Connection,
    SiteFolder,
    make_site,
    site_request,
)
from dafne_federated.core.dataset import open_folder
from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.site_request import SiteRequest
from dafne_federated.server.deployment_folder import ServerSettings, make_server

CONNECTION = Connection(coordinator="federation.example.org:9443")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = ServerSettings(hosts=("localhost",))
    return make_server(tmp_path_factory.mktemp("server"), chosen).authority


@pytest.fixture
def site(tmp_path: Path, authority: Path, squares_folder: Path) -> SiteFolder:
    return make_site(tmp_path / "my site", "clinic", CONNECTION, authority, squares_folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_making_it_twice_changes_nothing(
    site: SiteFolder, authority: Path, squares_folder: Path
) -> None:
    before = contents(site.path)
    make_site(site.path, "clinic", CONNECTION, authority, squares_folder)
    assert contents(site.path) == before


def test_only_its_owner_can_read_keys_and_settings(site: SiteFolder) -> None:
    folders = [site.path, *(path for path in site.path.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    for path in (site.key, site.secret, site.settings_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_its_settings_name_every_case_once_and_lie_in_the_folder(
    site: SiteFolder, squares_folder: Path
) -> None:
    settings = site.settings
    cases = [case.name for case in open_folder(squares_folder).cases]
    assert sorted(settings.training + settings.validation) == sorted(cases)
    assert (len(settings.training), len(settings.validation)) == (6, 2)
    assert (settings.cache, settings.inbox) == (site.path / "cache", site.path / "inbox")
    assert settings.privacy_marker == site.path / "privacy-marker.json"
    assert not settings.privacy_marker.is_relative_to(settings.cache)
    assert (settings.data, settings.share_statistics) == (squares_folder, False)
    assert site.connection == CONNECTION


def test_the_request_holds_the_public_half_of_the_key(site: SiteFolder) -> None:
    request = SiteRequest.read(site.request_file("clinic"))
    assert request == site_request(site)
    assert "PRIVATE" not in site.request_file("clinic").read_text()


def test_what_does_not_fit_is_refused_before_anything_is_made(
    tmp_path: Path, authority: Path, squares_folder: Path
) -> None:
    def make(name: str = "clinic", ca: Path = authority, data: Path = squares_folder) -> None:
        make_site(tmp_path / "new", name, CONNECTION, ca, data)

    with pytest.raises(SettingsError, match="name: expected letters"):
        make(name="a/b")
    with pytest.raises(SettingsError, match="expected the certificate that the coordinator gave"):
        make(ca=squares_folder / "dataset.json")
    with pytest.raises(DataError, match="expected a data folder"):
        make(data=tmp_path / "nothing")
    assert not (tmp_path / "new").exists()


def test_another_name_or_coordinator_is_refused(
    site: SiteFolder, tmp_path: Path, authority: Path, squares_folder: Path
) -> None:
    with pytest.raises(SettingsError, match="the folder of site 'clinic', got 'other'"):
        make_site(site.path, "other", CONNECTION, authority, squares_folder)
    other = make_server(tmp_path / "other", ServerSettings(hosts=("localhost",))).authority
    with pytest.raises(SettingsError, match="is another certificate than"):
        make_site(site.path, "clinic", CONNECTION, other, squares_folder)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("min-cases = 1", "min-cases = 0", "min_cases: .*greater"),
        ("min-cases = 1", "least-cases = 1", "least_cases: Extra"),
        ("min-cases = 1", "min-cases = ", "Invalid value"),
        ('coordinator = "federation.example.org:9443"', 'coordinator = "x"', "connection.coord"),
        ("[connection]", "[line]", "connection"),
    ],
)
def test_wrong_settings_are_named(site: SiteFolder, old: str, new: str, words: str) -> None:
    text = site.settings_file.read_text()
    assert old in text
    site.settings_file.write_text(text.replace(old, new))
    with pytest.raises(SettingsError, match=words):
        _ = (site.connection, site.settings)
