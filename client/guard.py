"""Flower's `flwr-clientapp`, behind a guard: only bundles without code, only our program.

Flower starts this in place of its own program for every message, because its folder comes
first on the path. A bundle that is more than configuration is refused before anything of it is
unpacked; the refusal goes to the site's log in words, and to the server as Flower's own error.

It replaces a name in a module of Flower 1.41 that is not public; a test watches over it.
"""

import os
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import ApprovalError
from dafne_federated.core.files import sha256, write_atomic
from dafne_federated.core.flower_bundle import check_bundle

REFUSALS = "DAFNE_FEDERATED_REFUSALS"  # environment: the file that refusals are noted in


def write_guard(folder: Path) -> None:
    """Write the program that Flower is to start instead of its own `flwr-clientapp`."""
    python = shlex.quote(sys.executable)
    path = folder / "flwr-clientapp"
    write_atomic(path, f'#!/bin/sh\nexec {python} -P -m {__name__} "$@"\n'.encode())
    path.chmod(0o700)


def guarded(unpack: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``unpack``, Flower's own function, behind a look at the bundle.

    It raises Flower's error of a program that cannot be loaded, which is reported without text.
    """
    from flwr.clientapp.client_app import LoadClientAppError

    def unpack_checked(content: bytes, *given: Any, **named: Any) -> Any:
        try:
            check_bundle(content)
        except ApprovalError as error:
            _note(f"bundle {sha256(content)[:16]} refused: {error}")
            msg = "this site refuses the bundle"
            raise LoadClientAppError(msg) from None
        return unpack(content, *given, **named)

    return unpack_checked


def main() -> None:
    """Do what Flower's own program does, with checked bundles."""
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    unpack = runtime.install_from_fab  # type: ignore[attr-defined]  # not public
    runtime.install_from_fab = guarded(unpack)  # type: ignore[attr-defined]
    flwr_clientapp()


def _note(words: str) -> None:
    line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {words}\n"
    sys.stderr.write(line)
    if noted := os.environ.get(REFUSALS):
        with Path(noted).open("a", encoding="utf-8") as file:
            file.write(line)


if __name__ == "__main__":
    main()
