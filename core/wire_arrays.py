"""Put states into messages, and take arrays out without trusting them: size and shape first.

A state may travel as float16, which halves the bytes. Its values are then those that float16
has, at both ends: what a site evaluates is the state that the server keeps. Stored statistics
are left out of that and travel as float32 always: a variance that is small beside the base's
is their difference, and a few digits less would turn it negative.
"""

import io
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, RecordDict

from dafne_federated.core.errors import MessageError, StateError
from dafne_federated.core.plan import AdaptationPlan, WireType
from dafne_federated.core.state import State, check_state, without_factors
from dafne_federated.core.wire import array_record

# What numpy's file format adds to the values of one array at most, in bytes.
_HEADER = 1024


def state_record(plan: AdaptationPlan, state: State, wire: WireType) -> ArrayRecord:
    """Return a state of ``plan`` as it travels.

    Raises:
        StateError: See ``rounded``.
    """
    return array_record(_cast(plan, state, wire))


def rounded(plan: AdaptationPlan, state: State, wire: WireType) -> State:
    """Return the state that arrives where ``state`` is sent: float32, with fewer digits.

    A value moves by at most 2**-11 of itself, by at most 2**-25 where it is below 2**-14;
    stored statistics do not move.

    Raises:
        StateError: A value is too large for the type that travels, or not finite.

    Source:
        IEEE 754, binary16: 11 significant bits, smallest step 2**-24, largest value 65504.
    """
    return {name: array.astype(np.float32) for name, array in _cast(plan, state, wire).items()}


def take_state(
    content: RecordDict,
    plan: AdaptationPlan,
    wire: WireType = "float32",
    *,
    absent: Collection[str] = (),
) -> State:
    """Return the checked state that a message carries, float32.

    Names, shapes, dtypes and byte counts are compared with the plan and the request before any
    byte is parsed; no pickle is ever read.

    Args:
        content: The message.
        plan: The plan that the state must be one of.
        wire: The type of values that the request of the round names.
        absent: Factors, ``a`` or ``b``, that do not travel in this message.

    Raises:
        StateError: The arrays are not a state of ``plan`` in this type.
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
    arrays = take_arrays(content, shapes, wire, plan.state_shapes(trained=False))
    state = {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
    check_state(plan, state, absent)
    return state


def take_arrays(
    content: RecordDict,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str = "float32",
    exact: Collection[str] = (),
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of these names and shapes, all of them finite.

    Args:
        content: The message.
        shapes: By name.
        dtype: The type of their values.
        exact: Names of those that are float32 whatever ``dtype`` is.

    Raises:
        StateError: A name is missing or unknown, or a shape, dtype or value is wrong.
    """
    record = _record(content)
    if shapes.keys() != set(record.keys()):
        missing, unknown = (
            sorted(shapes.keys() - record.keys()),
            sorted(record.keys() - shapes.keys()),
        )
        msg = f"arrays differ from the plan: missing {missing[:5]}, unknown {unknown[:5]}"
        raise StateError(msg)
    arrays = {
        name: _parse(name, record[name], shapes[name], "float32" if name in exact else dtype)
        for name in sorted(shapes)
    }
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            msg = f"array {name!r}: expected finite values, got {bad} that are not"
            raise StateError(msg)
    return arrays


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


def _cast(
    plan: AdaptationPlan, state: State, wire: WireType
) -> Mapping[str, npt.NDArray[np.floating]]:
    """Return the values in the type that travels, checked: a cast must not make infinities."""
    if wire == "float32":
        return state
    with np.errstate(over="ignore"):
        exact = plan.state_shapes(trained=False)
        cast: dict[str, npt.NDArray[np.floating]] = {
            name: array if name in exact else array.astype(np.float16)
            for name, array in state.items()
        }
    for name, array in cast.items():
        if not np.isfinite(array).all():
            limit, got = np.finfo(np.float16).max, np.abs(state[name]).max()
            msg = f"array {name!r}: expected values within {limit:g} to send them as float16"
            raise StateError(f"{msg}, got {got:g}; take wire float32")
    return cast


def _record(content: RecordDict) -> ArrayRecord:
    try:
        return content.array_records["arrays"]
    except KeyError:
        msg = f"the message has no arrays; got {sorted(content)}"
        raise StateError(msg) from None


def _parse(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
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
