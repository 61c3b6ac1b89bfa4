"""What a site gives the coordinator to be registered: its name and its public key."""

from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import fingerprint, write_atomic
from dafne_federated.core.wire import SiteName

_LARGEST = 16 * 1024  # bytes


class SiteRequest(BaseModel):
    """A request to be registered; nothing in it is secret, but it must not be changed on its way.

    Attributes:
        name: The site's name; it is what the coordinator's records call it.
        public_key: Its key on the curve P-384, one line as OpenSSH writes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SiteName
    public_key: str = Field(max_length=1000)

    @field_validator("public_key")
    @classmethod
    def _is_a_key(cls, text: str) -> str:
        try:
            key = serialization.load_ssh_public_key(text.encode())
        except Exception:
            msg = "expected a public key as OpenSSH writes it"
            raise ValueError(msg) from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
            msg = "expected a key on the curve P-384"
            raise ValueError(msg)
        plain = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        return plain.decode()

    @property
    def fingerprint(self) -> str:
        """Short text that two people can compare on the telephone."""
        return fingerprint(self.public_key.encode())

    def write(self, path: Path) -> None:
        """Write the request to a file."""
        write_atomic(path, self.model_dump_json(indent=2).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a request.

        Raises:
            SettingsError: The file is not one.
        """
        try:
            with path.open("rb") as file:
                return cls.model_validate_json(file.read(_LARGEST))
        except OSError as error:
            msg = f"{path}: cannot read the request of a site: {error.strerror}"
            raise SettingsError(msg) from None
        except ValidationError as error:
            first = error.errors()[0]
            words = first["msg"].removeprefix("Value error, ")
            msg = f"{path}: {'.'.join(map(str, first['loc'])) or 'file'}: {words}"
            raise SettingsError(msg) from None
