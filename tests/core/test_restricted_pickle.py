"""Dafne's own pickles are read exactly; anything else is refused and nothing runs."""

import collections
import os
import pickle
import struct
import uuid
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest
import torch

from dafne_federated.core.errors import ModelFileError
from dafne_federated.core.restricted_pickle import read_pickle

WEIGHTS = [np.arange(12, dtype=np.float32).reshape(3, 4), np.float32([1.5]), np.zeros(())]
VALUES: list[Any] = [1, 1.5, "text", None, True, b"bytes", [1, (2, 3)], {"a": {"b": [1]}}]


class Runs:
    """A pickle of this calls what it is given when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("dump", [pickle.dumps, dill.dumps], ids=["pickle", "dill"])
@pytest.mark.parametrize("protocol", [3, 4])  # those that Dafne ever wrote
def test_plain_values_and_arrays_come_back(dump: Any, protocol: int) -> None:
    content = {"values": VALUES, "weights": WEIGHTS}
    back = read_pickle(dump(content, protocol=protocol))
    assert back["values"] == VALUES
    for got, want in zip(back["weights"], WEIGHTS, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def test_fortran_order_and_byte_order_come_back() -> None:
    arrays = [np.asfortranarray(WEIGHTS[0]), WEIGHTS[0].astype(">f4"), np.array([True, False])]
    for got, want in zip(read_pickle(dill.dumps(arrays, protocol=4)), arrays, strict=True):
        np.testing.assert_array_equal(got, want)


def test_torch_weights_come_back_as_arrays() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = collections.OrderedDict(weight=tensor, step=torch.tensor(3), turned=tensor.T)
    back = read_pickle(dill.dumps(state, protocol=4))
    assert isinstance(back, collections.OrderedDict)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value.numpy())


def test_uuid_is_text() -> None:
    identity = uuid.UUID("210e2a21-1984-4e6f-8675-bf57bbabef2f")
    assert read_pickle(pickle.dumps([identity], protocol=4)) == [str(identity)]


def test_a_module_is_inert_text() -> None:
    found = read_pickle(dill.dumps([uuid], protocol=4))
    assert found[0].text == "uuid"
    assert not callable(found[0])


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (os.system, ("touch {file}",), r"system'.*nothing was executed"),
        (eval, ("open({file!r}, 'w')",), r"eval'.*nothing was executed"),
        (Path.touch, (Path("{file}"),), "nothing was executed"),
        (dill.loads, (b"",), r"loads'.*nothing was executed"),
        (np.load, ("{file}",), r"load'.*nothing was executed"),
        (torch.load, ("{file}",), r"load'.*nothing was executed"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("dump", [pickle.dumps, dill.dumps], ids=["pickle", "dill"])
def test_code_is_refused_by_name_and_not_run(
    tmp_path: Path, dump: Any, function: Any, args: tuple[Any, ...], words: str
) -> None:
    mark = tmp_path / "it-ran"
    args = tuple(a.format(file=str(mark)) if isinstance(a, str) else a for a in args)
    data = dump({"model_id": "x", "weights": Runs(function, *args)}, protocol=4)
    with pytest.raises(ModelFileError, match=words):
        read_pickle(data)
    assert not mark.exists()


def test_dill_helpers_cannot_reach_anything_else() -> None:
    import dill._dill as helpers

    text = read_pickle(pickle.dumps([Runs(helpers._import_module, "os.system")], protocol=4))
    assert text[0].text == "os.system"  # dill would import it; here it is only read
    for call in (
        Runs(helpers._get_attr, os, "system"),
        Runs(helpers._create_array, os.system, ("true",), None, None),
        Runs(helpers._create_function, None),
    ):
        with pytest.raises(ModelFileError):
            read_pickle(dill.dumps([call], protocol=4))


def test_a_hidden_pickle_in_torch_storage_is_refused(tmp_path: Path) -> None:
    import io

    from torch.storage import _load_from_bytes

    mark = tmp_path / "it-ran"
    buffer = io.BytesIO()
    torch.save(Runs(os.system, f"touch {mark}"), buffer)
    data = pickle.dumps([Runs(_load_from_bytes, buffer.getvalue())], protocol=4)
    with pytest.raises(ModelFileError):
        read_pickle(data)
    assert not mark.exists()


def test_the_reader_cannot_be_changed_by_build() -> None:
    # BUILD with (None, {name: value}) sets attributes on whatever is on the stack.
    for module, name in (("numpy", "dtype"), ("dill._dill", "_create_array"), ("uuid", "UUID")):
        attack = f"c{module}\n{name}\n".encode() + b"(N(dVanything\nI1\nstb."
        with pytest.raises(ModelFileError):
            read_pickle(attack)


@pytest.mark.parametrize("code", ["O", "V8", "f4,i4"])
def test_only_plain_arrays(code: str) -> None:
    data = pickle.dumps([np.zeros(2, dtype=code)], protocol=4)
    with pytest.raises(ModelFileError):
        read_pickle(data)


@pytest.mark.parametrize(
    "data", [b"", b"just a text file\n", b"\x80\x04", pickle.dumps(WEIGHTS, protocol=4)[:-20]]
)
def test_what_is_not_a_whole_pickle_gets_one_clear_error(data: bytes) -> None:
    with pytest.raises(ModelFileError, match="not a complete Dafne model"):
        read_pickle(data)


def bomb(depth: int) -> bytes:
    """A pickle of some hundred bytes that stands for 2**depth texts."""
    value: Any = "text"
    for _ in range(depth):
        value = [value, value]
    return pickle.dumps({"model_id": "a", "metadata": value}, protocol=4)


def test_shared_lists_are_counted_as_often_as_they_are_met() -> None:
    read_pickle(bomb(10))
    assert len(bomb(40)) < 400
    with pytest.raises(ModelFileError, match="unfolds into far more than it holds"):
        read_pickle(bomb(40))


@pytest.mark.parametrize("put", [b"r" + struct.pack("<I", 2**28), b"p268435456\n"])
def test_a_high_memo_number_makes_no_room(put: bytes) -> None:
    with pytest.raises(ModelFileError, match="too many steps"):
        read_pickle(b"\x80\x04N" + put + b".")


def test_too_many_steps_are_refused() -> None:
    with pytest.raises(ModelFileError, match="too many steps"):
        read_pickle(b"\x80\x04(" + b"N0" * 600_000 + b"l.")


def test_arrays_that_share_their_bytes_do_not_add_up_to_more_than_the_file() -> None:
    from numpy.core.multiarray import _reconstruct  # type: ignore[attr-defined]

    raw = bytes(10_000)

    class Shares:
        def __reduce__(self) -> Any:
            state = (1, (2500,), np.dtype("<f4"), False, raw)
            return _reconstruct, (np.ndarray, (0,), b"b"), state

    assert len(read_pickle(pickle.dumps([Shares() for _ in range(3)], protocol=4))) == 3
    with pytest.raises(ModelFileError, match="unfolds into far more than it holds"):
        read_pickle(pickle.dumps([Shares() for _ in range(3000)], protocol=4))


@pytest.mark.parametrize("call", [np.dtype, collections.OrderedDict, dill._dill._import_module])
def test_what_would_multiply_a_list_takes_none(call: Any) -> None:
    value: Any = ["f", "4"]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(ModelFileError):
        read_pickle(pickle.dumps([Runs(call, value)], protocol=4))


@pytest.mark.parametrize(
    ("value", "words"),
    [("\ud800", "not Unicode"), (1 << 200, "whole number of 201 bits")],
)
def test_values_that_cannot_be_shown_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        read_pickle(pickle.dumps({"a": [value]}, protocol=4))


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A pickle of a float32 tensor over the storage 1, 2."""
    import io

    from torch._utils import _rebuild_tensor_v2
    from torch.storage import _load_from_bytes

    buffer = io.BytesIO()
    storage = torch.tensor([1.0, 2.0])._typed_storage()
    torch.save(storage, buffer, _use_new_zipfile_serialization=False)
    inner = Runs(_load_from_bytes, buffer.getvalue())
    rest = (offset, size, stride, False, collections.OrderedDict())
    return pickle.dumps([Runs(_rebuild_tensor_v2, inner, *rest)], protocol=4)


def test_tensors_within_their_storage_are_read() -> None:
    np.testing.assert_array_equal(read_pickle(tensor((2,), (1,)))[0], [1, 2])
    np.testing.assert_array_equal(read_pickle(tensor((1,), (1,), 1))[0], [2])
    np.testing.assert_array_equal(read_pickle(tensor((2,), (0,)))[0], [1, 1])
    assert read_pickle(tensor((0, 3), (3, 1)))[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((300_000_000,), (0,), 0), ((100,), (1,), 0), ((2,), (1,), 1), ((2,), (-1,), 1)],
    ids=["stride 0", "too large", "beyond the end", "backwards"],
)
def test_tensors_beyond_their_storage_are_refused(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(ModelFileError, match="does not fit the 2 values that the file holds"):
        read_pickle(tensor(size, stride, offset))


@pytest.mark.parametrize("old_format", [True, False])
def test_what_torch_refuses_is_said_in_our_words(tmp_path: Path, old_format: bool) -> None:
    import io

    from torch.storage import _load_from_bytes

    buffer = io.BytesIO()
    attack = Runs(os.system, f"touch {tmp_path / 'it-ran'}")
    torch.save(attack, buffer, _use_new_zipfile_serialization=not old_format)
    words = "nothing was executed" if old_format else "in the format that torch pickles them"
    with pytest.raises(ModelFileError, match=words) as caught:
        read_pickle(pickle.dumps([Runs(_load_from_bytes, buffer.getvalue())], protocol=4))
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "it-ran").exists()


def test_a_dtype_that_numpy_lacks_is_named() -> None:
    data = pickle.dumps({"a": torch.zeros(2, dtype=torch.bfloat16)}, protocol=4)
    with pytest.raises(ModelFileError, match=r"dtype torch\.bfloat16"):
        read_pickle(data)
