"""How the program text inside a model differs from that of models that were approved before.

The people of a hospital who approve a model cannot be asked to read its whole program. Mostly
a new base carries the same text as one that they know, and then that is all they need to hear.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dafne_federated.core.model_file import ModelFile

_CONTEXT = 1  # lines around each change


@dataclass(frozen=True)
class SourceChanges:
    """The program of a model beside those that are known.

    Attributes:
        kind: ``same`` as in ``known``, ``changed`` from it, or ``new`` where none is known.
        known: The model it was compared with, the most similar one; None if there is none.
        lines: A unified diff from that one; empty for the same text.
        added: Lines that the other does not have.
        removed: Lines that only the other has.
        functions: Functions that the model carries.
    """

    kind: Literal["same", "changed", "new"]
    known: ModelFile | None
    lines: tuple[str, ...]
    added: int
    removed: int
    functions: int


def source_changes(model: ModelFile, known: Sequence[ModelFile]) -> SourceChanges:
    """Compare the function sources of ``model`` with those of models that were approved."""
    functions = sum(1 for text in model.functions.values() if text)
    for other in known:
        if other.sources_digest == model.sources_digest:
            return SourceChanges("same", other, (), 0, 0, functions)
    if not known:
        return SourceChanges("new", None, (), 0, 0, functions)
    found = [(other, _difference(other, model)) for other in known]
    # Of the same family first, then what differs least; the digest makes it one order.
    other, lines = min(
        found, key=lambda f: (f[0].model_id != model.model_id, len(f[1]), f[0].digest)
    )
    added = sum(1 for line in lines if line.startswith("+") and not line.startswith("+++ "))
    removed = sum(1 for line in lines if line.startswith("-") and not line.startswith("--- "))
    return SourceChanges("changed", other, tuple(lines), added, removed, functions)


def _difference(old: ModelFile, new: ModelFile) -> list[str]:
    lines: list[str] = []
    for name in sorted(old.functions.keys() | new.functions.keys()):
        before, after = ((m.functions.get(name) or "").splitlines() for m in (old, new))
        lines += difflib.unified_diff(
            before, after, f"{name} (approved)", f"{name} (this one)", n=_CONTEXT, lineterm=""
        )
    return lines
