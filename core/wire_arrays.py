"""Take arrays out of a message without trusting them: size and shape first, then bytes."""

import io
import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, RecordDict

from dafne_federated.core.errors import MessageError, StateError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, check_state, without_factors

# What numpy's file format adds to the values of one array at most, in bytes.
_HEADER = 1024


def take_state(content: RecordDict, plan: AdaptationPlan, *, absent: Collection[str] = ()) -> State:
    """Return the checked state that a message carries.

    Names, shapes, dtypes and byte counts are compared with the plan before any byte is parsed;
    no pickle is ever read.

    Args:
        content: The message.
        plan: What is trained.
        absent: Factors, ``a`` or ``b``, that do not travel in this message.

    Raises:
        StateError: The arrays are not a state of ``plan``.
    """
    record = _record(content)
    factor, axis = ("/b", 0) if "a" in absent else ("/a", -1)
    ranks = {
        array.shape[axis]
        for name, array in record.items()
        if name.endswith(factor) and len(array.shape) > 0
    }
    if len(ranks) > 1:
        msg = f"rank: expected one rank in all layers, got {sorted(ranks)}"
        raise StateError(msg)
    rank = min(ranks, default=plan.rank)
    if not 1 <= rank <= plan.max_rank:
        msg = f"rank: expected 1 to {plan.max_rank}, got {rank}"
        raise StateError(msg)
    shapes = without_factors(plan.state_shapes(rank), absent)
    if shapes.keys() != set(record.keys()):
        missing, unknown = (
            sorted(shapes.keys() - record.keys()),
            sorted(record.keys() - shapes.keys()),
        )
        msg = f"arrays differ from the plan: missing {missing[:5]}, unknown {unknown[:5]}"
        raise StateError(msg)
    state = {name: _parse(name, record[name], shapes[name]) for name in sorted(shapes)}
    check_state(plan, state, absent)
    return state


def take_bytes(content: RecordDict, name: str, limit: int) -> bytes:
    """Return bytes that travelled as one uint8 array.

    Raises:
        MessageError: There is no such array, or it is larger than ``limit`` bytes.
    """
    try:
        array = _record(content)[name]
        size = math.prod(array.shape)
        if array.dtype != "uint8" or len(array.shape) != 1 or size > limit:
            msg = f"array {name!r}: expected at most {limit} bytes, got {array.shape} {array.dtype}"
            raise MessageError(msg)
        return _parse(name, array, (size,), "uint8").tobytes()
    except (KeyError, StateError) as error:
        msg = f"array {name!r} is missing or damaged: {error}"
        raise MessageError(msg) from None


def _record(content: RecordDict) -> ArrayRecord:
    try:
        return content.array_records["arrays"]
    except KeyError:
        msg = f"the message has no arrays; got {sorted(content)}"
        raise StateError(msg) from None


def _parse(
    name: str, array: Array, shape: tuple[int, ...], dtype: str = "float32"
) -> npt.NDArray[np.float32]:
    """Return the values after checking what is claimed, what is inside, and the exact size."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    claimed = (tuple(array.shape), array.dtype, array.stype)
    length = len(array.data)
    if claimed != (shape, dtype, "numpy.ndarray") or not size < length <= size + _HEADER:
        msg = f"array {name!r}: expected {shape} {dtype}, got {claimed[0]} {claimed[1]}"
        raise StateError(f"{msg} in {length} bytes")
    stream = io.BytesIO(array.data[:_HEADER])
    try:  # numpy's reader would believe the inner header, so only that is read with numpy
        version = np.lib.format.read_magic(stream)
        inner = np.lib.format.read_array_header_1_0(stream, max_header_size=_HEADER)
    except Exception:  # the header is a text that numpy parses; damage can raise anything
        msg = f"array {name!r}: its bytes are damaged"
        raise StateError(msg) from None
    if version != (1, 0) or inner != (shape, False, kind) or length != stream.tell() + size:
        msg = f"array {name!r}: its bytes do not hold {shape} {dtype}"
        raise StateError(msg)
    values = np.frombuffer(array.data, kind, offset=stream.tell()).reshape(shape)
    return values.copy()
