"""Dafne's own pickles are read exactly; anything else is refused and nothing runs."""

import collections
import os
import pickle
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
