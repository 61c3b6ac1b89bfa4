"""A Dafne bundle comes back as it was written, and nothing in one is unpickled."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dafne_federated.core.bundles import bundle_labels, read_bundle, write_bundle
from dafne_federated.core.errors import DataError
from dafne_federated.core.volumes import Case

WHO = {"name": "one", "person": "anna", "site": "north"}
SHAPE = (3, 4, 2)


def arrays(**changes: Any) -> dict[str, Any]:
    content = {
        "data": np.arange(24, dtype=np.float32).reshape(SHAPE),
        "resolution": np.array([0.5, 0.75, 8.0]),
        "mask_vastus_L": np.ones(SHAPE, np.uint8),
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), placed=st.booleans())
def test_what_is_written_is_what_is_read(tmp_path: Path, seed: int, placed: bool) -> None:
    rng = np.random.default_rng(seed)
    case = Case(
        image=rng.normal(0, 1e3, SHAPE).astype(np.float32),
        masks={"vastus_L": rng.random(SHAPE) < 0.5, "empty": np.zeros(SHAPE, bool)},
        spacing=(0.5, 0.75, 8.0),
        affine=rng.normal(0, 1, (4, 4)) if placed else None,
        **WHO,
    )
    write_bundle(case, tmp_path / "one.npz", comment="drawn twice")
    read = read_bundle(tmp_path / "one.npz", **WHO)
    assert (read.name, read.person, read.site) == ("one", "anna", "north")
    assert read.spacing == case.spacing
    np.testing.assert_array_equal(read.image, case.image)
    assert set(read.masks) == {"vastus_L", "empty"}
    for name, mask in case.masks.items():
        np.testing.assert_array_equal(read.masks[name], mask)
    np.testing.assert_array_equal(read.affine, case.affine)
    assert read.partly  # slices without a region are ones that a user of Dafne left out
    assert bundle_labels(tmp_path / "one.npz") == ["empty", "vastus_L"]


def test_other_entries_and_number_types_are_accepted(tmp_path: Path) -> None:
    content = arrays(
        data=np.full(SHAPE, 7, np.int16),
        mask_vastus_L=np.full(SHAPE, 255.0),
        dice=np.array(0.9),
        model=np.array("thigh"),
    )
    np.savez(tmp_path / "one.npz", **content)
    read = read_bundle(tmp_path / "one.npz", **WHO)
    assert read.image.dtype == np.float32
    assert read.masks["vastus_L"].all()
    assert read.affine is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "expected an entry 'data'"),
        ({"resolution": None}, "expected an entry 'resolution'"),
        ({"data": np.zeros((3, 4))}, r"'data': expected real numbers .* shape \(3, 4\)"),
        ({"data": np.zeros(SHAPE, dtype="U3")}, "'data': expected real numbers"),
        ({"resolution": np.ones(2)}, "voxel size: expected three lengths"),
        ({"resolution": np.array([1, 1, 0.0])}, "voxel size: expected three lengths"),
        (
            {"mask_vastus_L": np.ones((3, 4, 3))},
            r"'mask_vastus_L': .* \(3, 4, 2\), got \(3, 4, 3\)",
        ),
        ({"affine": np.zeros((4, 4))}, r"affine: expected a \(4, 4\) matrix"),
        ({"affine": np.full((4, 4), np.nan)}, r"affine: expected a \(4, 4\) matrix"),
        ({"data": np.full(SHAPE, None, object)}, "holds pickled objects"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "one.npz", **arrays(**changes))
    with pytest.raises(DataError, match=words) as caught:
        read_bundle(tmp_path / "one.npz", **WHO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.9])
def test_a_bundle_cut_short_is_one_clear_line(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, **arrays())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(DataError, match=r"one.npz': damaged, cut short or not a bundle"):
        read_bundle(path, **WHO)
    with pytest.raises(DataError, match=r"one.npz': damaged, cut short or not a bundle"):
        bundle_labels(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16))
def test_random_damage_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "one.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    for place in rng.integers(0, len(data), 6):
        data[place] = rng.integers(0, 256)
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        read_bundle(path, **WHO)


def test_a_missing_file_and_a_plain_array_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_bundle(tmp_path / "none.npz", **WHO)
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="not a bundle"):
        read_bundle(tmp_path / "one.npz", **WHO)
