"""The key of a person on a Dafne server: from a file, the environment or the keyring."""

import importlib.util
import os
from pathlib import Path

from pydantic import SecretStr

from dafne_federated.core.errors import SettingsError

VARIABLE = "DAFNE_API_KEY"
SERVICE = "dafne-federated"


def find_key(address: str, file: Path | None = None) -> SecretStr:
    """Return the key for a server; it is in no text that this package prints.

    Looked for in this order: ``file``; the environment variable DAFNE_API_KEY; the keyring of
    the system, under service ``dafne-federated`` and the address as the user name, where the
    library ``keyring`` is installed.

    Raises:
        SettingsError: There is no key, or what was found is not one line of text.
    """
    if file is not None:
        return _checked(_read(file), f"{file}")
    if VARIABLE in os.environ:
        return _checked(os.environ[VARIABLE], VARIABLE)
    if found := _from_keyring(address):
        return _checked(found, "keyring")
    msg = (
        f"no key for {address}: expected --key-file FILE, the variable {VARIABLE}, or a key in "
        f"the keyring (keyring set {SERVICE} {address})"
    )
    raise SettingsError(msg)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        msg = f"{file}: the key cannot be read: {error.strerror}"
        raise SettingsError(msg) from None
    except UnicodeDecodeError:  # its text would show bytes of the file
        return ""


def _checked(text: str, where: str) -> SecretStr:
    key = text.strip()
    if not key or not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        msg = (
            f"{where}: expected a key of letters, digits and signs on one line, got something else"
        )
        raise SettingsError(msg)
    return SecretStr(key)


def _from_keyring(address: str) -> str | None:
    if importlib.util.find_spec("keyring") is None:
        return None
    import keyring
    import keyring.errors

    try:
        found: str | None = keyring.get_password(SERVICE, address)
    except keyring.errors.KeyringError:  # no keyring on this machine, or a locked one
        return None
    return found
