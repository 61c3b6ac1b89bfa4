"""Read the pickle inside a Dafne `.model` without executing anything of it.

A `.model` is one dill pickle of plain values and arrays. A pickle may name any Python
callable, so this reader knows a short list of names that Dafne's own files use and gives
each a stand-in that can only build an array, a tensor's values or a text. Every other name
ends the reading with an error that states the name. A small file cannot ask for much memory
either: before reading, the pickle's steps are counted, and what it builds is counted after.
"""

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Never

import numpy as np

from dafne_federated.core.errors import ModelFileError

# Dafne's largest model takes 4,401 steps; what follows is far above any of them.
_MOST_STEPS: Final = 1_000_000
_MOST_VALUES: Final = 1_000_000
_MOST_BITS: Final = 128  # of a whole number; a UUID has as many
_LONGEST_REASON: Final = 200
# Arrays and texts together may be so many times as large as the file: tied weights share theirs.
_MOST_OF_FILE: Final = 16
_ALWAYS_FINE: Final = 2**20  # bytes


def read_pickle(data: bytes) -> Any:
    """Return the value pickled in ``data``; arrays and tensors come as numpy arrays.

    Raises:
        ModelFileError: The bytes are not a complete pickle, name a callable that is not on
            the list of what Dafne files need, or unfold into far more than the file holds.
    """
    try:
        _check_steps(data)
        most = max(_MOST_OF_FILE * len(data), _ALWAYS_FINE)
        return _Resolver(most).resolve(_Reader(io.BytesIO(data)).load())
    except ModelFileError:
        raise
    except RecursionError:
        msg = "the file nests values too deeply to be a Dafne model"
        raise ModelFileError(msg) from None
    except Exception as error:  # a corrupt pickle can raise nearly anything
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        msg = f"not a complete Dafne model (a pickled dictionary): {type(error).__name__}: {reason}"
        raise ModelFileError(msg) from None


def _check_steps(data: bytes) -> None:
    """Refuse a pickle of too many steps, or one that remembers a value under a high number.

    The reader would make room for 2**28 values because of five bytes.
    """
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(data), start=1):
        index = int(argument or 0) if opcode.name in ("PUT", "LONG_BINPUT") else 0
        if max(count, index) > _MOST_STEPS:
            msg = "the file takes too many steps to read to be a Dafne model"
            raise ModelFileError(msg)


class _Frozen:
    """Base of all stand-ins: no attribute can be set by the pickle's BUILD opcode."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> Never:
        msg = f"the file tries to change {name!r} of the reader"
        raise ModelFileError(msg)


class _Call(_Frozen):
    """A callable that a pickle may call but not change."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> Never:
        msg = "the file tries to change the reader"
        raise ModelFileError(msg)


class _Name(_Frozen):
    """A module or class that is only ever mentioned: inert text."""

    __slots__ = ("text",)
    text: str

    def __init__(self, text: object) -> None:
        if not isinstance(text, str):
            msg = f"expected the name of a module, got a {type(text).__name__}"
            raise ModelFileError(msg)
        object.__setattr__(self, "text", text)


class _Dtype(_Frozen):
    """A numpy dtype given by its code and byte order."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, code: object, *_flags: object) -> None:
        value = np.dtype(code if isinstance(code, str) else "O")
        if value.kind not in "biufcSU" or value.subdtype is not None:
            msg = f"an array has dtype {value}, expected numbers or text"
            raise ModelFileError(msg)
        object.__setattr__(self, "value", value)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order in {"<", ">"}:
            object.__setattr__(self, "value", self.value.newbyteorder(order))


class _Array(_Frozen):
    """An array whose content arrives by BUILD, as numpy's own pickles write it."""

    __slots__ = ("value",)
    value: Any

    def __init__(self) -> None:
        object.__setattr__(self, "value", np.zeros(0))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, raw = state
        flat = np.frombuffer(raw, dtype=dtype.value)
        array = flat.reshape(shape, order="F" if fortran else "C")
        object.__setattr__(self, "value", array)


class _Uuid(_Frozen):
    """A `uuid.UUID`, kept as its text."""

    __slots__ = ("value",)
    value: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        number = f"{state['int']:032x}"
        parts = (number[:8], number[8:12], number[12:16], number[16:20], number[20:])
        object.__setattr__(self, "value", "-".join(parts))


def _reconstruct(kind: object, _shape: object, _code: object) -> _Array:
    if not (isinstance(kind, _Name) and kind.text == "numpy.ndarray"):
        msg = f"expected arrays of numpy's own class, got another ({type(kind).__name__})"
        raise ModelFileError(msg)
    return _Array()


def _create_array(
    function: object, args: tuple[Any, ...], state: tuple[Any, ...], extra: object = None
) -> _Array:
    if function is not _RECONSTRUCT or extra:
        msg = "an array is built by a function other than numpy's own"
        raise ModelFileError(msg)
    array = _reconstruct(*args)
    array.__setstate__(state)
    return array


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype=dtype.value)[0].item()


def _get_attribute(owner: object, name: str) -> Any:
    return _lookup(owner.text if isinstance(owner, _Name) else "?", name)


def _ordered_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()  # filled step by step; made from a list it could multiply that list


def _torch_storage(raw: object) -> Any:
    import torch

    # Tensors keep their values in torch's older format; the newer one, a zip, could be packed.
    if not isinstance(raw, bytes) or raw.startswith(b"PK"):
        msg = "expected the values of a tensor in the format that torch pickles them"
        raise ModelFileError(msg)
    try:
        storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception:  # whatever torch says is about its own options
        storage = None
    if not isinstance(storage, torch.storage.TypedStorage):
        msg = "the values of a tensor cannot be read; nothing was executed"
        raise ModelFileError(msg)
    return storage


def _torch_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: object
) -> Any:
    import torch

    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    steps = zip(size, stride, strict=True)
    last = offset + sum((n - 1) * step for n, step in steps) if math.prod(size) else 0
    if min(offset, *size, *stride, 0) < 0 or last >= max(held, 1) or math.prod(size) > held:
        msg = f"a tensor of shape {tuple(size)} does not fit the {held} values that the file holds"
        raise ModelFileError(msg)
    tensor = torch.empty(0, dtype=storage.dtype)
    tensor.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))
    try:
        return tensor.numpy()
    except TypeError:
        msg = f"a tensor has dtype {storage.dtype}, expected one that numpy knows"
        raise ModelFileError(msg) from None


_RECONSTRUCT = _Call(_reconstruct)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Call(_Dtype),
    ("numpy", "ndarray"): _Name("numpy.ndarray"),
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core._multiarray_umath", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core._multiarray_umath", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _Call(_scalar),
    ("numpy._core.multiarray", "scalar"): _Call(_scalar),
    ("dill._dill", "_create_array"): _Call(_create_array),
    ("dill._dill", "_import_module"): _Call(_Name),
    ("dill._dill", "_get_attr"): _Call(_get_attribute),
    ("collections", "OrderedDict"): _Call(_ordered_dict),
    ("uuid", "UUID"): _Uuid,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_torch_tensor),
    ("torch.storage", "_load_from_bytes"): _Call(_torch_storage),
}


def _lookup(module: str, name: str) -> Any:
    try:
        return _ALLOWED[module, name]
    except KeyError:
        msg = (
            f"the file asks for {f'{module}.{name}'!r}, which a Dafne model does not need; "
            f"nothing was executed"
        )
        raise ModelFileError(msg) from None


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _lookup(module, name)

    def persistent_load(self, pid: object) -> Never:
        msg = f"the file refers to something outside itself: {pid!r}"
        raise ModelFileError(msg)


class _Resolver:
    """Turns stand-ins into values, and counts while it does so.

    A list that a pickle mentions twice counts twice, because whoever walks through the result
    meets it twice: some hundred bytes can say a list of 2**40 values.
    """

    def __init__(self, most_bytes: int) -> None:
        self._bytes_left = most_bytes
        self._values_left = _MOST_VALUES

    def resolve(self, value: Any) -> Any:
        self._spend(values=1)
        if isinstance(value, (_Array, _Dtype, _Uuid)):
            value = value.value
        if isinstance(value, dict):
            # dict's own: the pickle can hide an OrderedDict's method behind an attribute
            items = dict.items(value)
            return type(value)((self.resolve(k), self.resolve(v)) for k, v in items)
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(self.resolve(v) for v in value)
        if isinstance(value, np.ndarray):
            self._spend(size=value.nbytes)
            return value.copy(order="K")
        if isinstance(value, (str, bytes, bytearray)):
            self._spend(size=len(value))
        if isinstance(value, str) and not _is_unicode(value):
            msg = "the file holds a text that is not Unicode (a lone surrogate)"
            raise ModelFileError(msg)
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            msg = f"the file holds a whole number of {value.bit_length()} bits"
            raise ModelFileError(msg)
        if not isinstance(value, _PLAIN):
            msg = f"the file holds a {type(value).__name__} where a value is expected"
            raise ModelFileError(msg)
        return value

    def _spend(self, values: int = 0, size: int = 0) -> None:
        self._values_left -= values
        self._bytes_left -= size
        if min(self._values_left, self._bytes_left) < 0:
            msg = "the file unfolds into far more than it holds, which no Dafne model does"
            raise ModelFileError(msg)


_PLAIN: Final = (str, bytes, bytearray, int, float, complex, type(None), np.dtype, _Name)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
