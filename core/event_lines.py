"""Events of a run, one JSON object a line; a line that is cut off spoils no other."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Append one event."""
    line = json.dumps(event)
    with path.open("ab+") as file:
        if file.tell() and not _ends_line(file):  # a kill left half a line behind
            line = "\n" + line
        file.write(line.encode() + b"\n")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all events so far; a line that is being written is left for the next look."""
    for text in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        with contextlib.suppress(ValueError):  # half a line that a kill left behind
            yield json.loads(text)


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"
