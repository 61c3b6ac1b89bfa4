"""Read the pickle inside a Dafne `.model` without executing anything of it.

A `.model` is one dill pickle of plain values and arrays. A pickle may name any Python
callable, so this reader knows a short list of names that Dafne's own files use and gives
each a stand-in that can only build an array, a tensor's values or a text. Every other name
ends the reading with an error that states the name.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Never

import numpy as np

from dafne_federated.core.errors import ModelFileError


def read_pickle(data: bytes) -> Any:
    """Return the value pickled in ``data``; arrays and tensors come as numpy arrays.

    Raises:
        ModelFileError: The bytes are not a complete pickle, or name a callable that is not
            on the list of what Dafne files need.
    """
    try:
        return _resolve(_Reader(io.BytesIO(data)).load())
    except ModelFileError:
        raise
    except RecursionError:
        msg = "the file nests values too deeply to be a Dafne model"
        raise ModelFileError(msg) from None
    except Exception as error:  # a corrupt pickle can raise nearly anything
        msg = f"not a complete Dafne model (a pickled dictionary): {type(error).__name__}: {error}"
        raise ModelFileError(msg) from None


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

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "text", text)


class _Dtype(_Frozen):
    """A numpy dtype given by its code and byte order."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, code: object, *_flags: object) -> None:
        value = np.dtype(str(code))
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
        array = flat.reshape(shape, order="F" if fortran else "C").copy(order="K")
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
        msg = f"an array of an unknown class {kind!r}"
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


def _torch_storage(raw: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _torch_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: object
) -> Any:
    import torch

    tensor = torch.empty(0, dtype=storage.dtype)
    tensor.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))
    return tensor.numpy().copy()


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
    ("collections", "OrderedDict"): OrderedDict,
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


def _resolve(value: Any) -> Any:
    if isinstance(value, (_Array, _Dtype, _Uuid)):
        return value.value
    if isinstance(value, _Name):
        return value
    if isinstance(value, dict):
        return type(value)((_resolve(k), _resolve(v)) for k, v in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_resolve(v) for v in value)
    if isinstance(value, (_Call, type)):
        msg = "the file holds a bare callable where a value is expected"
        raise ModelFileError(msg)
    return value
