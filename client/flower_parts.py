"""Parts of Flower 1.41 that a site replaces by name; tests watch over what they do there."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from dafne_federated.core.errors import RunError


def replace_parts(
    module: ModuleType, who: str, **parts: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Put functions of ours in place of Flower's.

    Args:
        module: Flower's.
        who: What is started with them, for the message.
        parts: Ours by Flower's names.

    Returns:
        Flower's, by name.

    Raises:
        RunError: There is no such name, so that this version of Flower is another one.
    """
    if not all(hasattr(module, name) for name in parts):
        msg = f"this version of Flower is not one that the {who} was made for"
        raise RunError(msg)
    theirs = {name: getattr(module, name) for name in parts}
    for name, part in parts.items():
        setattr(module, name, part)
    return theirs
