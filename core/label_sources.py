"""Give a model's function sources other labels, in their syntax tree; nothing is executed.

Known are the ways in which Dafne's own models state their labels and the width of the network,
that is its channels for background and labels:

* ``LABELS_DICT`` as a literal at the top of a function, or imported from a table of
  ``dafne_dl.labels``; ``inverse_labels`` imported from such a table;
* the width as a number, or as what follows from ``LABELS_DICT``: in the layer that is the head
  (build function), and where channels are cut off, ``[0, :, :, :13]`` (the other functions).

Afterwards every function has a literal ``LABELS_DICT`` that everything else follows from, so a
result can be rewritten again. What is not known is refused: nothing is guessed.

Source:
    ``generate_thigh_split_model.py``, ``generate_leg_split_model.py`` and the trainer's
    ``generate_model.py.tmpl`` of the dafne-models repository, read for what they state and where.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Never

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.model_file import source_labels

Labels = dict[int, str]

_TABLE: Final = "LABELS_DICT"
_BUILD: Final = "init_model_function"
_NEEDED: Final = (_BUILD, "apply_model_function", "incremental_learn_function")
_TABLES: Final = re.compile(r"(dafne_dl|dl)\.labels\.(?!utils$)\w+")
_READING: Final = {"items", "keys", "values", "get"}
_HEADS: Final = {"Conv2D", "Convolution2D", "Dense"}  # layers whose output channels are last

_COUNTING: Final[dict[str, Callable[..., Any]]] = {
    "max": max,
    "len": len,
    "list": list,
    "sorted": sorted,
}
_REPEATED: Final = (
    *(ast.For, ast.While, ast.Lambda, ast.FunctionDef),
    *(ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp),
)


def relabelled(
    functions: Mapping[str, str | None], old: Labels, labels: Sequence[str]
) -> dict[str, str | None]:
    """Return the function sources for other labels; sources that state none stay as they are.

    Args:
        functions: Sources by their key in the file.
        old: The label names of the sources, by output channel 1, 2, ...
        labels: The new names, channel 1 first.

    Raises:
        ModelFileError: A source states labels or width in a way that is not known; it says
            which function, and what could not be found.
    """
    new = dict(enumerate(labels, start=1))
    try:
        return {
            key: _Source(key, source).relabelled(old, new)
            if source and (key in _NEEDED or _TABLE in source)
            else source
            for key, source in functions.items()
        }
    except RecursionError:
        msg = "cannot give this model other labels: a source is nested too deeply"
        raise ModelFileError(msg) from None


class _Source:
    """One function source, while it is rewritten."""

    def __init__(self, key: str, source: str) -> None:
        self.key = key
        self.build = key == _BUILD
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            body = []
        if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
            self._refuse("is not the source text of one function")
        self.function = body[0]
        self.source = source

    def relabelled(self, old: Labels, new: Labels) -> str:
        stated = self._replace_table(old, new)
        fixed = self._fixed_widths(len(old))
        swap = {id(self._origin(width)): _expression(f"max({_TABLE}) + 1") for width in fixed}
        _Swap(swap).visit(self.function)
        if fixed or not stated:
            self._refuse_leftovers(old, new)
        text = ast.unparse(ast.fix_missing_locations(self.function)) + "\n"
        again = _Source(self.key, text)
        if source_labels(text) != new or again._fixed_widths(len(new)):
            self._refuse("could not be rewritten so that all of it follows from the new labels")
        return text

    def _replace_table(self, old: Labels, new: Labels) -> bool:
        """Put the new table in; return whether the function had one of its own."""
        self._refuse_other_use()
        imports, inverse = self._imported_tables()
        stored = [n for n in ast.walk(self.function) if _stores(n, _TABLE)]
        own = [
            node
            for node in self.function.body
            if isinstance(node, ast.Assign) and node.targets == stored
        ]
        if len(stored) != len(own) or len(own) > 1 or (own and imports):
            self._refuse(f"sets {_TABLE} in several places or not at its top")
        if own:
            if source_labels(self.source) != old:
                self._refuse(f"has another {_TABLE} than {old}, as the model states elsewhere")
            own[0].value = _expression(repr(new))
            return True
        if not imports and not self.build:
            self._refuse(f"states no labels: neither a literal {_TABLE} nor a table of dafne_dl")
        for node in imports:
            node.names = []
        lines = [f"{_TABLE} = {new!r}"]
        lines += [f"{name} = {{v: k for k, v in {_TABLE}.items()}}" for name in inverse]
        top = 0 if ast.get_docstring(self.function) is None else 1
        self.function.body[top:top] = ast.parse("\n".join(lines)).body
        _Swap({id(node): ast.Pass() for node in imports}).visit(self.function)
        return False

    def _imported_tables(self) -> tuple[list[ast.ImportFrom], list[str]]:
        """Return the imports of label tables, and the names that inverse tables get."""
        found, inverse = [], []
        for node in ast.walk(self.function):
            if not isinstance(node, ast.ImportFrom) or not _TABLES.fullmatch(node.module or ""):
                continue
            for alias in node.names:
                if alias.name == "inverse_labels":
                    inverse.append(alias.asname or alias.name)
                elif (alias.asname or alias.name) != _TABLE:
                    self._refuse(f"imports {alias.name!r} of {node.module}, which is not known")
            found.append(node)
        return found, sorted(set(inverse))

    def _fixed_widths(self, count: int) -> list[ast.expr]:
        """Return where a width stands that does not follow from the table of ``count`` labels."""
        tables = [dict.fromkeys(range(1, count + more), "") for more in (1, 2)]
        known = [self._known(table) for table in tables]
        if not self.build:
            cuts = [(cut, [_evaluate(cut, names) for names in known]) for cut in self._cuts()]
            return [cut for cut, values in cuts if self._is_fixed_cut(cut, values, count)]
        widths = [(w, [_evaluate(w, names) for names in known]) for w in self._layer_widths()]
        heads = [width for width, values in widths if values == [count + 1, count + 2]]
        follows = bool(heads)
        if not follows:
            heads = [width for width, values in widths if values[0] == count + 1]
        if len(heads) != 1:
            wanted = f"one layer ({', '.join(sorted(_HEADS))}) of {count + 1} output channels"
            self._refuse(f"does not show the head: expected {wanted}, found {len(heads)}")
        blocks = [n for n in ast.walk(self.function) if isinstance(n, _REPEATED)]
        inside = (part for block in blocks[1:] for part in ast.walk(block))
        if any(part is heads[0] for part in inside):
            self._refuse("makes the head inside a loop or function, perhaps more than once")
        return [] if follows else heads

    def _is_fixed_cut(self, cut: ast.expr, values: list[Any], count: int) -> bool:
        """Return whether a cut is a number, given what it is with one more label, too.

        More channels than there are count as all of them: Dafne's leg model cuts at 13 with 7
        channels, which takes the weight map in, and that is zero there.
        """
        value = values[0]
        if values == [count + 1, count + 2] or (isinstance(value, int) and value < 0):
            return False
        if not isinstance(value, int) or value < count + 1:
            wanted = f"expected {count + 1} or what follows from {_TABLE}"
            self._refuse(f"cuts channels at {ast.unparse(cut)!r}: {wanted}")
        return True

    def _layer_widths(self) -> Iterator[ast.expr]:
        for node in ast.walk(self.function):
            if isinstance(node, ast.Call) and _called(node) in _HEADS:
                named = [k.value for k in node.keywords if k.arg in ("filters", "units")]
                yield from (named or node.args)[:1]

    def _cuts(self) -> Iterator[ast.expr]:
        """Yield N of each ``[0, :, :, :N]`` and ``[..., :N]``."""
        for node in ast.walk(self.function):
            if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
                continue
            indices = node.slice.elts
            many = len(indices) > 2 or any(
                isinstance(i, ast.Constant) and i.value is ... for i in indices
            )
            last = indices[-1] if indices else None
            if many and isinstance(last, ast.Slice) and last.lower is None and last.upper:
                yield last.upper

    def _known(self, table: Labels) -> dict[str, Any]:
        """Return the values of names that follow from the label table, or are numbers."""
        known: dict[str, Any] = {_TABLE: table}
        for name, value in self._definitions().items():
            if name != _TABLE:
                known[name] = _evaluate(value, known)
        return known

    def _definitions(self) -> dict[str, ast.expr]:
        """Return the expressions of names that are set once, at the top of the function."""
        stored = [
            n.arg if isinstance(n, ast.arg) else n.id
            for n in ast.walk(self.function)
            if isinstance(n, ast.arg) or (isinstance(n, ast.Name) and _stores(n, n.id))
        ]
        return {
            node.targets[0].id: node.value
            for node in self.function.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and stored.count(node.targets[0].id) == 1
        }

    def _origin(self, width: ast.expr) -> ast.expr:
        """Return where the number of a width stands: there, or where its name is set."""
        definitions = self._definitions()
        while isinstance(width, ast.Name) and width.id in definitions:
            width = definitions.pop(width.id)
        return width

    def _refuse_other_use(self) -> None:
        for node in ast.walk(self.function):
            if not isinstance(node, (ast.Attribute, ast.Subscript)):
                continue
            if not isinstance(node.value, ast.Name) or node.value.id != _TABLE:
                continue
            changes = not isinstance(node.ctx, ast.Load)
            if changes or (isinstance(node, ast.Attribute) and node.attr not in _READING):
                self._refuse(f"does more with {_TABLE} than read it: {ast.unparse(node)!r}")

    def _refuse_leftovers(self, old: Labels, new: Labels) -> None:
        """Refuse numbers that may count labels or channels, and names of labels that are gone."""
        gone = set(old.values()) - set(new.values())
        for node in _outside_layers(self.function):
            value = node.value if isinstance(node, ast.Constant) else None
            if type(value) is int and value in (len(old), len(old) + 1):
                self._refuse(f"has the number {value}, which may count its labels or channels")
            if not self.build and isinstance(value, str) and value in gone:
                self._refuse(f"names the label {value!r} outside of {_TABLE}")

    def _refuse(self, reason: str) -> Never:
        msg = f"cannot give this model other labels: its {self.key.replace('_', ' ')} {reason}"
        raise ModelFileError(msg)


class _Swap(ast.NodeTransformer):
    """Puts other nodes in place of some, by identity."""

    def __init__(self, swap: Mapping[int, ast.AST]) -> None:
        self._swap = swap

    def visit(self, node: ast.AST) -> Any:
        other = self._swap.get(id(node))
        return self.generic_visit(node) if other is None else other


def _outside_layers(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield all nodes but the label table and what is given to layers (windows, strides)."""
    waiting: list[ast.AST] = [function]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.Assign) and any(_stores(t, _TABLE) for t in node.targets):
            continue
        if isinstance(node, ast.Call) and (_called(node) in _HEADS or "Conv" in _called(node)):
            continue
        waiting.extend(ast.iter_child_nodes(node))


def _called(call: ast.Call) -> str:
    """Return the last part of the name of what is called; empty if it has none."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _stores(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """Return the value of sums and counts over the label table; None for all else."""
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return known.get(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _combined(operator.neg, int, [operand], known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _combined(operator.add, int, [left, right], known)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _combined(operator.sub, int, [left, right], known)
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _COUNTING:
            return _combined(_COUNTING[name], (dict, list), [inner], known)
        case ast.Call(func=ast.Attribute(value=inner, attr="keys"), args=[], keywords=[]):
            return _combined(list, dict, [inner], known)
    return None


def _combined(
    combine: Callable[..., Any],
    kind: type | tuple[type, ...],
    parts: list[ast.expr],
    known: Mapping[str, Any],
) -> Any:
    values = [_evaluate(part, known) for part in parts]
    return combine(*values) if all(isinstance(value, kind) for value in values) else None
