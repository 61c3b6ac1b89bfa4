"""Flower's `flwr-clientapp`, behind a guard: only bundles without code, only our program.

This is started in place of Flower's own program for every message, see ``work_starter.py``. A
bundle that is more than configuration is refused, and the refusal goes to the site's log in
words, and to the server as Flower's own error. No bundle is ever unpacked here: what runs is
the installed program, whatever the server names.

It replaces two names in a module of Flower 1.41 that are not public; a test watches over them.
"""

from collections.abc import Callable
from typing import Any

from dafne_federated.client.refusals import note_refusal
from dafne_federated.core.errors import ApprovalError, RunError
from dafne_federated.core.files import sha256
from dafne_federated.core.flower_bundle import check_bundle

REPLACED = ("install_from_fab", "get_load_client_app_fn")


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
        note_refusal(f"bundle {sha256(content)[:16]} refused: {error}")
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

    if not all(hasattr(runtime, name) for name in REPLACED):
        msg = "this version of Flower is not one that the guard was made for"
        raise RunError(msg)
    runtime.install_from_fab = look_at_bundle  # type: ignore[attr-defined, assignment]
    runtime.get_load_client_app_fn = installed_loader  # type: ignore[attr-defined]
    flwr_clientapp()


if __name__ == "__main__":
    main()
