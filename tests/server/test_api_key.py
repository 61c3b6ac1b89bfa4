"""The key is found where it was put, and what is no key is refused without being shown."""

from pathlib import Path

import pytest

from dafne_federated.core.errors import SettingsError
from dafne_federated.server.api_key import SERVICE, VARIABLE, find_key

ADDRESS = "https://dafne.example.org/api/"


def test_a_file_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "from-the-environment")
    (tmp_path / "key").write_text("from-the-file\n")
    assert find_key(ADDRESS, tmp_path / "key").get_secret_value() == "from-the-file"
    assert find_key(ADDRESS).get_secret_value() == "from-the-environment"
    assert "from-the" not in repr(find_key(ADDRESS))


def test_without_a_key_the_ways_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    with pytest.raises(SettingsError, match=f"--key-file FILE, the variable {VARIABLE}"):
        find_key(ADDRESS)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"a\nb", b"\xff\xfesecret", b"a\x00"]
)
def test_what_is_no_key_is_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match="expected a key") as caught:
        find_key(ADDRESS, tmp_path / "key")
    assert "secret" not in str(caught.value)
    assert "two words" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere: the key cannot be read"):
        find_key(ADDRESS, tmp_path / "nowhere")


def test_the_keyring_is_asked_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = pytest.importorskip("keyring")
    from keyring.backend import KeyringBackend

    class Memory(KeyringBackend):
        priority = 1  # type: ignore[assignment]
        kept: dict[tuple[str, str], str] = {}  # noqa: RUF012

        def get_password(self, service: str, username: str) -> str | None:
            return self.kept.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            self.kept[service, username] = password

        def delete_password(self, service: str, username: str) -> None:
            del self.kept[service, username]

    monkeypatch.delenv(VARIABLE, raising=False)
    before = keyring.get_keyring()
    keyring.set_keyring(Memory())
    try:
        keyring.set_password(SERVICE, ADDRESS, "from-the-keyring")
        assert find_key(ADDRESS).get_secret_value() == "from-the-keyring"
        with pytest.raises(SettingsError, match="no key for"):
            find_key("https://another.example.org/")
    finally:
        keyring.set_keyring(before)
