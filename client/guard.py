"""Flower's `flwr-clientapp`, behind a guard: only bundles without code, only our program.

Flower starts this in place of its own program for every message, because its folder comes
first on the path. A bundle that is more than configuration is refused, and the refusal goes to
the site's log in words, and to the server as Flower's own error. No bundle is ever unpacked
here: what runs is the installed program, whatever the server names.

It replaces two names in a module of Flower 1.41 that are not public; a test watches over them.
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


def look_at_bundle(content: bytes, *_given: Any, **_named: Any) -> None:
    """Refuse a bundle that is more than configuration; stands where Flower would unpack it.

    Raises:
        LoadClientAppError: Flower's error of a program that cannot be loaded. The server hears
            of it without its text.
    """
    from flwr.clientapp.client_app import LoadClientAppError

    try:
        check_bundle(content)
    except ApprovalError as error:
        _note(f"bundle {sha256(content)[:16]} refused: {error}")
        msg = "this site refuses the bundle"
        raise LoadClientAppError(msg) from None


def installed_loader(*_given: Any, **_named: Any) -> Callable[..., Any]:
    """Return what loads the installed program; stands where Flower would look into the bundle."""

    def load(*_names: str) -> Any:
        from dafne_federated.client.app import app

        return app

    return load


def main() -> None:
    """Do what Flower's own program does, with checked bundles and the installed program."""
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    runtime.install_from_fab = look_at_bundle  # type: ignore[attr-defined, assignment]
    runtime.get_load_client_app_fn = installed_loader  # type: ignore[attr-defined]
    flwr_clientapp()


def _note(words: str) -> None:
    line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {words}\n"
    sys.stderr.write(line)
    if noted := os.environ.get(REFUSALS):
        with Path(noted).open("a", encoding="utf-8") as file:
            file.write(line)


if __name__ == "__main__":
    main()
