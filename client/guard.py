"""Flower's `flwr-clientapp`, behind a guard: only bundles without code, only our program.

Flower starts this in place of its own program for every message, because its folder comes
first on the path. A bundle that is more than configuration is refused, and the refusal goes to
the site's log in words, and to the server as Flower's own error. No bundle is ever unpacked
here: what runs is the installed program, whatever the server names.

It replaces two names in a module of Flower 1.41 that are not public; a test watches over them.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import ApprovalError, RunError
from dafne_federated.core.files import sha256, write_atomic
from dafne_federated.core.flower_bundle import check_bundle

PROGRAM = "flwr-clientapp"
REFUSALS = "DAFNE_FEDERATED_REFUSALS"  # environment: the file that refusals are noted in


def write_guard(folder: Path) -> Path:
    """Write the program that Flower is to start instead of its own `flwr-clientapp`.

    It can be executed before it has its name: at no moment would a search along the path pass
    over it.
    """
    python, path = shlex.quote(sys.executable), folder / PROGRAM
    new = folder / f".{PROGRAM}.new"
    write_atomic(new, f'#!/bin/sh\nexec {python} -P -m {__name__} "$@"\n'.encode())
    new.chmod(0o700)
    return new.replace(path)


def require_guard(guard: Path, search: str) -> None:
    """Refuse to start where Flower would start another program than the guard.

    Args:
        guard: The guard.
        search: The path along which Flower looks for programs.

    Raises:
        RunError: The guard is not found first, or cannot be executed where it lies.
    """
    found = shutil.which(PROGRAM, path=search)
    if found is None or Path(found) != guard:
        msg = (
            f"{guard}: expected to be the program that Flower starts, got {found}; the disk of "
            "the site's folder must allow programs (it may be mounted noexec)"
        )
        raise RunError(msg)


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
