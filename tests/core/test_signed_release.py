"""A release is, to the byte, what was signed, or one error says what was changed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dafne_federated.core.errors import ReleaseError, SettingsError
from dafne_federated.core.files import sha256
from dafne_federated.core.signed_release import (
    MANIFEST,
    SIGNATURE,
    ReleaseManifest,
    make_signing_key,
    public_fingerprint,
    sign,
    verify,
)

FILES = {"Limb_1.model": b"the model", "Limb.json": b"{}", "model-card.html": b"<p>good</p>"}
MANIFESTED = ReleaseManifest(
    model="Limb_1.model",
    files={name: sha256(data) for name, data in FILES.items()},
    name="Limb",
    version=1,
    run="0" * 32,
    round=2,
    base_digest="a" * 64,
    content_digest="b" * 64,
)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "keys" / "release.key", tmp_path / "release.pub"
    make_signing_key(*paths)
    return paths


@pytest.fixture
def release(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = tmp_path / "release"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    sign(folder, MANIFESTED, keys[0])
    return folder


def test_what_was_signed_is_verified(release: Path, keys: tuple[Path, Path]) -> None:
    (release / "notes.txt").write_text("of somebody")
    for path in (release, release / "Limb_1.model"):
        found = verify(path, keys[1])
        assert found.manifest == MANIFESTED
        assert (found.known, found.others) == (True, ("notes.txt",))
        assert found.fingerprint == public_fingerprint(keys[1])
    assert not verify(release).known


def test_a_key_is_kept_and_secret_and_signs_the_same_again(
    release: Path, keys: tuple[Path, Path]
) -> None:
    before = keys[0].read_bytes(), keys[1].read_bytes(), (release / SIGNATURE).read_bytes()
    make_signing_key(*keys)
    sign(release, MANIFESTED, keys[0])
    assert before == (
        keys[0].read_bytes(),
        keys[1].read_bytes(),
        (release / SIGNATURE).read_bytes(),
    )
    assert keys[0].stat().st_mode & 0o077 == 0


def flip(name: str) -> Callable[[Path], None]:
    def change(release: Path) -> None:
        data = bytearray((release / name).read_bytes())
        data[len(data) // 2] ^= 1
        (release / name).write_bytes(bytes(data))

    return change


def other_signature(release: Path) -> None:
    """The whole release signed by somebody else."""
    make_signing_key(release.parent / "other.key", release.parent / "other.pub")
    sign(release, MANIFESTED, release.parent / "other.key")


def other_list(release: Path) -> None:
    """A model and a list that fit each other, with the old signature."""
    (release / "Limb_1.model").write_bytes(b"another")
    files = MANIFESTED.files | {"Limb_1.model": sha256(b"another")}
    changed = MANIFESTED.model_copy(update={"files": files})
    (release / MANIFEST).write_text(changed.model_dump_json(indent=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip("Limb_1.model"), r"Limb_1\.model: was changed: expected digest"),
        (flip("model-card.html"), r"model-card\.html: was changed"),
        (flip("Limb.json"), r"Limb\.json: was changed"),
        (flip(MANIFEST), r"release\.json: the signature does not fit"),
        (other_list, r"release\.json: the signature does not fit"),
        (other_signature, r"SIGNATURE: signed by another key: expected .*, got "),
        (lambda release: (release / "Limb.json").unlink(), r"Limb\.json: belongs .* is missing"),
        (lambda release: (release / MANIFEST).unlink(), r"expected a release, got no release\.js"),
        (lambda release: (release / SIGNATURE).unlink(), "is not signed"),
        (lambda release: (release / SIGNATURE).write_bytes(b"{}"), "SIGNATURE: is damaged: key"),
    ],
)
def test_every_change_is_one_clear_error(
    release: Path, keys: tuple[Path, Path], change: Callable[[Path], None], words: str
) -> None:
    change(release)
    with pytest.raises(ReleaseError, match=words):
        verify(release, keys[1])


def test_no_byte_of_the_signature_can_change(release: Path, keys: tuple[Path, Path]) -> None:
    text = (release / SIGNATURE).read_text()
    place = text.index('"signature": "') + 20
    digit = "0" if text[place] != "0" else "1"
    (release / SIGNATURE).write_text(text[:place] + digit + text[place + 1 :])
    with pytest.raises(ReleaseError, match="signature does not fit"):
        verify(release, keys[1])


def test_a_file_that_was_not_released_is_not_vouched_for(release: Path) -> None:
    (release / "merged.model").write_bytes(b"of somebody")
    with pytest.raises(ReleaseError, match=r"signed release here is 'Limb_1\.model', not"):
        verify(release / "merged.model")


def test_a_list_can_name_no_file_elsewhere() -> None:
    with pytest.raises(ValueError, match="files"):
        ReleaseManifest.model_validate(MANIFESTED.model_dump() | {"files": {"../x": "a" * 64}})


def test_what_is_no_key_is_refused_in_words(release: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(SettingsError, match="expected a public Ed25519 key as PEM"):
        verify(release, keys[0])
    with pytest.raises(SettingsError, match="expected a private Ed25519 key"):
        sign(release, MANIFESTED, keys[1])
