"""What is kept on disk is read back by name, the same bits, one array at a time."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.errors import StateError
from dafne_federated.core.state import State
from dafne_federated.core.stored_state import StoredState, keep_arrays


def test_what_was_kept_is_read_back(tmp_path: Path, make_state: Callable[..., State]) -> None:
    state = make_state(0)
    stored = keep_arrays(tmp_path / "a.npz", state)
    assert list(stored) == list(state)
    for name, array in stored.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state[name])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:  # a plain .npz
        assert set(archive.files) == set(state)


def test_a_file_that_was_replaced_is_read_anew(
    tmp_path: Path, make_state: Callable[..., State]
) -> None:
    stored = keep_arrays(tmp_path / "a.npz", make_state(0))
    assert stored["0004/a"].shape == (6, 2)
    keep_arrays(tmp_path / "a.npz", make_state(1, 5))
    np.testing.assert_array_equal(stored["0004/a"], make_state(1, 5)["0004/a"])


def test_a_file_that_is_gone_or_damaged_is_named(
    tmp_path: Path, make_state: Callable[..., State]
) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(StateError, match=r"a\.npz: an update that was kept cannot be read"):
        StoredState(path)["0004/a"]
    keep_arrays(path, make_state(0))
    os.truncate(path, 100)
    with pytest.raises(StateError, match=r"a\.npz: an update that was kept cannot be read"):
        StoredState(path)["0004/a"]
