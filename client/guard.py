"""Flower's `flwr-clientapp`, behind a guard: only bundles without code, only our program.

This is started in place of Flower's own program for every message, see ``work_starter.py``. A
bundle that is more than configuration is refused, in words that go to the site's own people and,
without names, to the server. No bundle is ever unpacked here: what runs is the installed
program, whatever the server names.

A guard that is told to end, as when what started it was killed, answers that it failed: without
an answer Flower's node would wait for it for ever, and do nothing else.

It replaces three names in a module of Flower 1.41 that are not public; a test watches over them.
"""

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from flwr.app import Context, Message

from dafne_federated.client.flower_parts import replace_parts
from dafne_federated.client.refusals import note_refusal
from dafne_federated.client.site_settings import REFUSED
from dafne_federated.core.errors import BundleError
from dafne_federated.core.files import sha256
from dafne_federated.core.flower_bundle import check_bundle

log = logging.getLogger(__name__)

REPLACED = ("install_from_fab", "get_load_client_app_fn", "register_signal_handlers")


@dataclass
class _Looked:
    """What this process, which handles one message, thinks of its bundle."""

    reason: str = "no bundle was looked at"


_LOOKED = _Looked()


def look_at_bundle(content: bytes, *_given: Any, **_named: Any) -> None:
    """Look whether a bundle is more than configuration; stands where Flower would unpack it."""
    try:
        check_bundle(content)
        _LOOKED.reason = ""
    except BundleError as error:
        _LOOKED.reason = f"declined: {error.reason}"
        note_refusal(f"bundle {sha256(content)[:16]} refused: {error}")
    except Exception:
        log.exception("the bundle cannot be looked at")
        _LOOKED.reason = "declined: the bundle cannot be looked at"


def installed_loader(*_given: Any, **_named: Any) -> Callable[..., Any]:
    """Return what loads the installed program; stands where Flower would look into the bundle.

    With a bundle that was refused, the program does nothing but say so.
    """
    return lambda *_names: _answer


def _answer(message: Message, context: Context) -> Message:
    """Let the installed program answer; no text of an exception leaves the site."""
    from flwr.clientapp.client_app import LoadClientAppError

    try:
        from dafne_federated.client.app import app

        if _LOOKED.reason:
            refusing = {**context.node_config, REFUSED: _LOOKED.reason}
            context = replace(context, node_config=refusing)
        return app(message, context)
    except Exception as error:
        msg = "the site's program ended"  # Flower tells the server a fixed text for this kind
        raise LoadClientAppError(msg) from error


def end_with_an_answer(*_given: Any, **named: Any) -> None:
    """Turn the first word to end into an answer; stands where Flower would end without one."""
    from flwr.supercore.exit import register_signal_handlers

    register_signal_handlers(**named)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ended)


def _ended(_number: int, _frame: FrameType | None) -> None:
    from flwr.clientapp.client_app import LoadClientAppError

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    msg = "the site's program was told to end"
    raise LoadClientAppError(msg)


def main() -> None:
    """Do what Flower's own program does, with checked bundles and the installed program."""
    import flwr.supernode.runtime.run_clientapp as runtime
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    ours: tuple[Callable[..., Any], ...]
    ours = (look_at_bundle, installed_loader, end_with_an_answer)
    replace_parts(runtime, "guard", **dict(zip(REPLACED, ours, strict=True)))
    flwr_clientapp()


if __name__ == "__main__":
    main()
