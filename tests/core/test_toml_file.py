"""Whatever is wrong with a file of settings is said in one line that names the file."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.toml_file import checked, read_toml


class Door(BaseModel):
    port: int


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "door.toml"
    path.write_text('port = 3\nname = "öffnen"')
    assert read_toml(path) == {"port": 3, "name": "öffnen"}
    assert checked(Door, read_toml(path), path) == Door(port=3)


def test_what_is_wrong_is_said_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "door.toml"
    with pytest.raises(SettingsError, match=r"door\.toml: make one with 'init'$"):
        read_toml(path, "make one with 'init'")
    for content in (b"port = ", b'port = "\xff"'):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match=r"door\.toml: cannot read settings: "):
            read_toml(path)
    with pytest.raises(SettingsError, match=r"cannot read settings: Is a directory$"):
        read_toml(tmp_path)
    with pytest.raises(SettingsError, match=r"door\.toml: port: Input should be a valid integer"):
        checked(Door, {"port": "front"}, path)
