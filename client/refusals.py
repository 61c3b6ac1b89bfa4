"""What a site did not do, and why: lines for its own people, in one file."""

import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

REFUSALS = "DAFNE_FEDERATED_REFUSALS"  # environment: the file that refusals are noted in
_LARGEST = 2**20  # bytes; then the file is put aside, and the one before it removed


def note_refusal(words: str) -> None:
    """Write a line to the site's file of refusals, if there is one, and to standard error.

    A file that cannot be written changes nothing: what was refused stays refused.
    """
    line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {words}\n"
    sys.stderr.write(line)
    if not (noted := os.environ.get(REFUSALS)):
        return
    path = Path(noted)
    with suppress(OSError):
        if path.exists() and path.stat().st_size > _LARGEST:
            os.replace(path, path.with_suffix(".log.1"))
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
