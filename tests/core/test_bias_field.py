"""A bias-field correction is computed once and found again with the same bits."""

import numpy as np
import pytest

from dafne_federated.core.bias_field import BiasFieldCache, CachedFilter
from dafne_federated.core.errors import SettingsError

sitk = pytest.importorskip("SimpleITK")


@pytest.fixture(autouse=True)
def one_thread():
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    yield
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def phantom(seed=0, side=20):
    rows, columns = np.indices((side, side))
    values = 100 + 20 * np.random.default_rng(seed).random((side, side)) + rows
    values[(rows - 10) ** 2 + (columns - 10) ** 2 > 70] = 3
    image = sitk.Cast(sitk.GetImageFromArray(values), sitk.sitkFloat32)
    image.SetSpacing((0.8, 1.25))
    image.SetOrigin((-3.0, 5.0))
    return image, sitk.OtsuThreshold(image, 0, 1, 200)


def correct(make, seed=0, iterations=(4, 4), with_mask=True, spacing=None):
    image, mask = phantom(seed)
    if spacing is not None:
        image.SetSpacing(spacing)
        mask.SetSpacing(spacing)
    filter_ = make()
    filter_.SetMaximumNumberOfIterations(list(iterations))
    return filter_.Execute(image, mask) if with_mask else filter_.Execute(image)


def real():
    return sitk.N4BiasFieldCorrectionImageFilter()


def cached(cache):
    return lambda: CachedFilter(real(), sitk, cache)


def assert_same_image(ours, theirs):
    assert ours.GetPixelID() == theirs.GetPixelID()
    assert ours.GetSpacing() == theirs.GetSpacing()
    assert ours.GetOrigin() == theirs.GetOrigin()
    assert ours.GetDirection() == theirs.GetDirection()
    assert sitk.GetArrayFromImage(ours).tobytes() == sitk.GetArrayFromImage(theirs).tobytes()


@pytest.mark.parametrize("with_mask", [True, False])
def test_first_and_second_answer_are_the_real_filters(tmp_path, with_mask):
    expected = correct(real, with_mask=with_mask)
    cache = BiasFieldCache(tmp_path)
    assert_same_image(correct(cached(cache), with_mask=with_mask), expected)
    assert_same_image(correct(cached(cache), with_mask=with_mask), expected)
    assert (cache.hits, cache.misses) == (1, 1)


def test_another_process_finds_the_file(tmp_path):
    expected = correct(cached(BiasFieldCache(tmp_path)))
    later = BiasFieldCache(tmp_path)
    assert_same_image(correct(cached(later)), expected)
    assert (later.hits, later.misses) == (1, 0)


def test_another_image_mask_parameter_or_geometry_is_another_entry():
    cache = BiasFieldCache()
    changes = [
        {},
        {"seed": 1},
        {"iterations": (4, 5)},
        {"with_mask": False},
        {"spacing": (1.0, 1.0)},
    ]
    for change in changes:
        assert_same_image(correct(cached(cache), **change), correct(real, **change))
    assert (cache.hits, cache.misses) == (0, len(changes))


def test_every_setter_is_part_of_the_key():
    cache = BiasFieldCache()
    image, mask = phantom()
    for call in ("SetConvergenceThreshold", "SetWienerFilterNoise", None):
        ours, theirs = cached(cache)(), real()
        for filter_ in (ours, theirs):
            filter_.SetMaximumNumberOfIterations([3])
            if call:
                getattr(filter_, call)(0.05)
        assert_same_image(ours.Execute(image, mask), theirs.Execute(image, mask))
    assert (cache.hits, cache.misses) == (0, 3)


def test_questions_about_a_remembered_run_are_answered_by_a_real_one():
    cache = BiasFieldCache()
    correct(cached(cache))
    image, mask = phantom()
    ours, theirs = cached(cache)(), real()
    for filter_ in (ours, theirs):
        filter_.SetMaximumNumberOfIterations([4, 4])
        filter_.Execute(image, mask)
    assert cache.hits == 1
    assert_same_image(ours.GetLogBiasFieldAsImage(image), theirs.GetLogBiasFieldAsImage(image))
    assert ours.GetElapsedIterations() == theirs.GetElapsedIterations()


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-40], lambda b: b[:150] + b"x" + b[151:], lambda b: b""]
)
def test_a_damaged_file_is_computed_again(tmp_path, caplog, damage):
    expected = correct(cached(BiasFieldCache(tmp_path)))
    (path,) = tmp_path.glob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    cache = BiasFieldCache(tmp_path)
    assert_same_image(correct(cached(cache)), expected)
    assert cache.misses == 1
    assert path.read_bytes() == whole
    assert "damaged" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_the_oldest_files_and_arrays_go_first(tmp_path):
    array = np.zeros((256, 256), np.float32)  # a quarter of a MiB
    cache = BiasFieldCache(tmp_path, limit_mib=1.1)
    for name in "abcdef":
        cache.put(name, array)
    kept = {path.stem for path in tmp_path.glob("*.npy")}
    assert len(kept) == 4
    assert "f" in kept
    assert cache.get("a") is None
    assert cache.get("f") is not None
    assert BiasFieldCache(tmp_path, limit_mib=1.1).get("f") is not None


def test_the_folder_is_for_its_owner_only(tmp_path):
    BiasFieldCache(tmp_path / "fields")
    assert (tmp_path / "fields").stat().st_mode & 0o077 == 0


def test_a_folder_that_vanished_costs_a_warning_not_the_run(tmp_path, caplog):
    folder = tmp_path / "fields"
    cache = BiasFieldCache(folder)
    folder.rmdir()
    folder.write_text("in the way")
    cache.put("a", np.zeros(3))
    assert cache.get("a") is not None
    assert "no longer cached on disk" in caplog.text


def test_limits_and_folders_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="must be positive, got 0 MiB"):
        BiasFieldCache(limit_mib=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot be used"):
        BiasFieldCache(tmp_path / "file")
