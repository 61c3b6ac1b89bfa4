"""Text from files, made safe to print: it stays on its line and cannot pass for ours."""

import json
import math
from typing import Any


def printable(value: object) -> str:
    """Return ``value`` as one line in which controls, also those of a terminal, are escaped.

    A model's name could otherwise hold line ends and ANSI sequences that draw a digest of its
    own. Texts stay as they are, all else is shown as JSON.
    """
    text = value if isinstance(value, str) else json.dumps(json_value(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_source(source: str) -> str:
    """Return program text with its lines and tabs, and all other controls escaped."""
    lines = source.replace("\r\n", "\n").expandtabs().split("\n")
    return "\n".join(printable(line) for line in lines)


def json_value(value: Any) -> Any:
    """Return ``value`` if it is JSON; what is not, such as an array, becomes text."""
    if isinstance(value, dict):
        return {str(key): json_value(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(entry) for entry in value]
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return repr(value)
