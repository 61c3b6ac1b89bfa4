"""A request to register holds a name and a key of the right kind, and nothing else."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.site_request import SiteRequest

OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def request(name: str = "clinic") -> SiteRequest:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return SiteRequest(name=name, public_key=key.public_bytes(*OPENSSH).decode() + " comment")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = request()
    made.write(tmp_path / "r.json")
    assert SiteRequest.read(tmp_path / "r.json") == made
    assert made.fingerprint != request().fingerprint
    assert "comment" not in made.public_key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("clinic", "../clinic"), "name: "),
        (("ecdsa-sha2-nistp384", "ecdsa"), "as OpenSSH writes it"),
        (('"name"', '"title"'), "name: Field required"),
        (("{", "["), "file: "),
    ],
)
def test_what_is_no_request_is_named(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    request().write(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text().replace(*change)
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(SettingsError, match=words):
        SiteRequest.read(tmp_path / "r.json")
    with pytest.raises(SettingsError, match="No such file"):
        SiteRequest.read(tmp_path / "other.json")


@pytest.mark.parametrize(
    "key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())]
)
def test_keys_of_another_kind_are_refused(tmp_path: Path, key: ed25519.Ed25519PrivateKey) -> None:
    text = key.public_key().public_bytes(*OPENSSH).decode()
    path = tmp_path / "r.json"
    path.write_text(f'{{"name": "clinic", "public_key": "{text}"}}')
    with pytest.raises(SettingsError, match=r"expected a key on the curve P-384"):
        SiteRequest.read(path)
