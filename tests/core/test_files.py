"""Files are whole or absent, and a digest depends on content alone."""

import os
from pathlib import Path

import numpy as np
import pytest

from dafne_federated.core.files import arrays_digest, sha256, write_atomic


def test_written_bytes_are_read_back(tmp_path: Path) -> None:
    write_atomic(tmp_path / "new" / "file", b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_is_the_published_one() -> None:
    # The value for "abc" in FIPS 180-2, appendix B.1.
    assert sha256(b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_digest_ignores_order_and_memory_layout() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.ones(2, np.float32)
    assert arrays_digest({"a": a, "b": b}) == arrays_digest({"b": b, "a": np.asfortranarray(a)})


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.zeros(4, np.float32)},
        {"a": np.zeros((2, 2), np.float64)},
        {"b": np.zeros((2, 2), np.float32)},
        {"a": np.array([[0, 0], [0, 1e-30]], np.float32)},
    ],
)
def test_digest_sees_shape_dtype_name_and_value(other: dict[str, np.ndarray]) -> None:
    assert arrays_digest({"a": np.zeros((2, 2), np.float32)}) != arrays_digest(other)
