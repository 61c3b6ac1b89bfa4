"""A release as files that belong together: their digests in one list, and a signature over it.

release.json   the digest of every file of the release, and where it comes from
SIGNATURE      the coordinator's Ed25519 signature over the bytes of release.json, and its key
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dafne_federated.core.errors import ReleaseError, SettingsError, first_fault
from dafne_federated.core.files import fingerprint, sha256, write_atomic
from dafne_federated.core.plan import Sha256

MANIFEST = "release.json"
SIGNATURE = "SIGNATURE"

FileName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]{1,200}$")]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]


class ReleaseManifest(BaseModel):
    """What a release consists of, and where it comes from.

    Attributes:
        format: Of this file.
        model: Name of the `.model` file.
        files: SHA-256 of every file by name.
        name: Name of the model.
        version: Its ``timestamp_id``, seconds since 1970.
        run: The run that made it.
        round: The round whose state it holds.
        base_digest: SHA-256 of the base.
        content_digest: SHA-256 of weights, identity and sources, without times.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: FileName
    files: dict[FileName, Sha256]
    name: str
    version: int
    run: str
    round: int
    base_digest: Sha256
    content_digest: Sha256


class ReleaseSignature(BaseModel):
    """Who signed: raw key (32 bytes) and signature (64 bytes) of Ed25519, as hexadecimal digits.

    Source:
        RFC 8032.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["Ed25519"] = "Ed25519"
    key: Hex
    signature: Hex


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        manifest: What the signed list says.
        folder: Where the release is.
        fingerprint: Of the key that signed it.
        known: Whether that key was given, or only came along with the release.
        others: Names of files beside it that belong to no release.
    """

    manifest: ReleaseManifest
    folder: Path
    fingerprint: str
    known: bool
    others: tuple[str, ...]


def make_signing_key(private: Path, public: Path) -> None:
    """Make a pair of keys; a private key that is there already is kept.

    Raises:
        SettingsError: The private key is damaged.
    """
    if not private.exists():
        made = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomic(private, made, private=True)
    pem = (
        _private_key(private)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    write_atomic(public, pem)


def public_fingerprint(public: Path) -> str:
    """Return the fingerprint of a public key in a PEM file; see ``verify`` for errors."""
    return fingerprint(_public_bytes(public))


def sign(folder: Path, manifest: ReleaseManifest, private: Path | None) -> None:
    """Write the list of a release and its signature; without a key the list alone.

    The same release and key give the same bytes.

    Raises:
        SettingsError: The key cannot be read.
    """
    data = manifest.model_dump_json(indent=2).encode()
    write_atomic(folder / MANIFEST, data)
    if private is None:
        (folder / SIGNATURE).unlink(missing_ok=True)
        return
    key = _private_key(private)
    signature = ReleaseSignature(
        key=key.public_key().public_bytes_raw().hex(), signature=key.sign(data).hex()
    )
    write_atomic(folder / SIGNATURE, signature.model_dump_json(indent=2).encode())


def verify(path: Path, public: Path | None = None) -> Verified:
    """Check that a release is, to the byte, what was signed; nothing in it is executed.

    Args:
        path: Folder of the release, or its `.model`.
        public: The coordinator's public key, from a source that you trust. Without it only the
            key that lies beside the release says that all its files belong together.

    Raises:
        ReleaseError: A file is missing or was changed, or somebody else signed.
        SettingsError: The public key cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    manifest, key = checked_manifest(folder, public)
    if not path.is_dir() and path.name != manifest.model:
        msg = f"{path.name}: the signed release here is {manifest.model!r}, not this file"
        raise ReleaseError(msg)
    for name, wanted in manifest.files.items():
        try:
            got = sha256((folder / name).read_bytes())
        except OSError:
            msg = f"{name}: belongs to the release and is missing"
            raise ReleaseError(msg) from None
        if got != wanted:
            msg = f"{name}: was changed: expected digest {wanted[:16]}, got {got[:16]}"
            raise ReleaseError(msg)
    own = {*manifest.files, MANIFEST, SIGNATURE}
    others = tuple(sorted(p.name for p in folder.iterdir() if p.name not in own))
    return Verified(manifest, folder, fingerprint(key), public is not None, others)


def checked_manifest(folder: Path, public: Path | None = None) -> tuple[ReleaseManifest, bytes]:
    """Return the signed list of a release and the key; its files are not looked at.

    Raises:
        ReleaseError: It is not signed, was changed, or somebody else signed.
        SettingsError: The public key cannot be read.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        msg = f"{folder}: expected a release, got no {MANIFEST}"
        raise ReleaseError(msg) from None
    try:
        signature = ReleaseSignature.model_validate_json((folder / SIGNATURE).read_bytes())
    except OSError:
        msg = f"{folder}: the release is not signed, so nobody vouches for its files"
        raise ReleaseError(msg) from None
    except ValidationError as error:
        msg = f"{SIGNATURE}: is damaged: {first_fault(error)}"
        raise ReleaseError(msg) from None
    key = bytes.fromhex(signature.key)
    if public is not None and (wanted := _public_bytes(public)) != key:
        msg = (
            f"{SIGNATURE}: signed by another key: expected {fingerprint(wanted)}, got "
            f"{fingerprint(key)}"
        )
        raise ReleaseError(msg)
    try:
        signed = Ed25519PublicKey.from_public_bytes(key)
        signed.verify(bytes.fromhex(signature.signature), data)
    except (InvalidSignature, ValueError):
        msg = f"{MANIFEST}: the signature does not fit: this list or {SIGNATURE} was changed"
        raise ReleaseError(msg) from None
    try:
        return ReleaseManifest.model_validate_json(data), key
    except ValidationError as error:
        msg = f"{MANIFEST}: {first_fault(error)}"
        raise ReleaseError(msg) from None


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        msg = f"{path}: expected a private Ed25519 key as PEM"
        raise SettingsError(msg)
    return key


def _public_bytes(path: Path) -> bytes:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        msg = f"{path}: expected a public Ed25519 key as PEM, such as release.pub"
        raise SettingsError(msg)
    return key.public_bytes_raw()
