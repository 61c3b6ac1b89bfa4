"""Dafne's own preprocessing gives the same bits with and without the fast parts."""

import os
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import skimage.morphology

from dafne_federated.core.bias_field import BiasFieldCache
from dafne_federated.core.errors import DataError, RunError, SettingsError
from dafne_federated.core.preprocessing import fast_preprocessing

pytestmark = pytest.mark.slow

BAND = 49


@pytest.fixture(scope="module")
def dafne():
    pytest.importorskip("SimpleITK")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from dafne_dl.common import preprocess_train

    return preprocess_train


@pytest.fixture(autouse=True)
def one_thread():
    sitk = pytest.importorskip("SimpleITK")
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    yield
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def phantom(seed, side=44, slices=2, dtype=np.uint8):
    """Draw slices with four muscles, specks and holes; the fourth muscle has two sides."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((side, side))
    images, masks = [], []
    for _ in range(slices):
        centre = side / 2 + rng.normal(0, 1, 2)
        distance = np.hypot(rows - centre[0], columns - centre[1])
        angle = np.arctan2(rows - centre[0], columns - centre[1])
        body = distance < side * 0.42
        values = np.where(body, 400 + 4.0 * columns, 0) + 30 * rng.random((side, side))
        sector = np.floor((angle + np.pi) / (2 * np.pi) * 5).astype(int) % 5
        names = ["soleus", "vastus", "sartorius", "gracilis_L", "gracilis_R"]
        parts = {}
        for index, name in enumerate(names):
            part = body & (sector == index) & (distance > side * 0.12)
            part ^= rng.random((side, side)) < 0.01
            parts[name] = part.astype(dtype)
        images.append(values + 60 * sector * body)
        masks.append(parts)
    return images, masks


INVERSE = {"soleus": 1, "vastus": 2, "sartorius": 3, "gracilis": 4}


def prepare(dafne, images, masks, size=48, factor=1.1, levels=2, swap=False, inverse=INVERSE):
    data = {"image_list": images, "resolution": np.array([1.0, 1.0])}
    resolution, size = np.array([1.0, 1.0]) / factor, [size, size]
    prepared = dafne.common_input_process_single(
        inverse, resolution, size, size, data, masks, swap, levels, -1
    )
    return dafne.input_creation_mem(*prepared, BAND)


def assert_same_slices(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert mine.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"factor": 1.0}),
        (2, {"factor": 0.7, "swap": True}),
        (3, {"factor": 1.8, "levels": 1}),
        (4, {"size": 30}),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float64])
def test_random_phantoms_have_the_same_bits_with_and_without(dafne, seed, changes, dtype):
    images, masks = phantom(seed, dtype=dtype)
    expected = prepare(dafne, images, masks, **changes)
    cache = BiasFieldCache()
    for workers in (1, 3):
        with fast_preprocessing(cache, workers):
            assert_same_slices(prepare(dafne, images, masks, **changes), expected)
    assert (cache.hits, cache.misses) == (len(images), len(images))
    with fast_preprocessing():
        assert_same_slices(prepare(dafne, images, masks, **changes), expected)


def test_the_split_form_has_the_same_bits(dafne):
    images, masks = [], []
    for seed in (0, 1):
        (image,), (parts,) = phantom(seed, side=200, slices=1)
        images.append(np.pad(np.hstack([image, np.zeros((200, 30)), image]), ((116, 116), (1, 1))))
        masks.append(
            {
                name: np.pad(np.hstack([part, np.zeros((200, 30)), part]), ((116, 116), (1, 1)))
                for name, part in parts.items()
            }
        )

    def run():
        data = {"image_list": images, "resolution": [1.0, 1.0]}
        return dafne.input_creation_mem(
            *dafne.common_input_process_split(
                INVERSE, np.array([1.0, 1.0]), [432, 432], [250, 250], data, masks, 1
            ),
            BAND,
        )

    expected = run()
    with fast_preprocessing(BiasFieldCache(), 2):
        assert_same_slices(run(), expected)


def real_slices():
    folder = os.environ.get("DAFNE_FEDERATED_TEST_DATA")
    if not folder:
        return [pytest.param(None, marks=pytest.mark.skip("DAFNE_FEDERATED_TEST_DATA is not set"))]
    sets = sorted(path for path in Path(folder).iterdir() if (path / "images").is_dir())
    return [pytest.param(path, id=path.name) for path in sets]


@pytest.mark.parametrize("folder", real_slices())
def test_real_slices_have_the_same_bits(dafne, folder):
    path = sorted((folder / "images").iterdir())[0]
    image = nib.load(path)
    volume = np.asarray(image.dataobj, np.float32)  # Dafne multiplies: whole numbers overflow
    labels = np.asarray(nib.load(folder / "labels" / path.name).dataobj)
    number = int(np.argmax((labels > 0).sum(axis=(0, 1))))
    present = [int(v) for v in np.unique(labels[..., number]) if v]
    masks = {f"label {v}": (labels[..., number] == v).astype(np.uint8) for v in present}
    inverse = {f"label {v}": index + 1 for index, v in enumerate(present)}
    size = 96
    factor = 1.05 * size / max(volume.shape[:2])
    arguments = ([volume[..., number]], [masks], size, factor, 4, False, inverse)
    expected = prepare(dafne, *arguments)
    cache = BiasFieldCache()
    for _ in range(2):
        with fast_preprocessing(cache):
            assert_same_slices(prepare(dafne, *arguments), expected)
    assert (cache.hits, cache.misses) == (1, 1)


@pytest.mark.parametrize("masks_set", [0, 1])
def test_overlaps_are_removed_alike(dafne, masks_set):
    masks = (np.random.default_rng(masks_set).random((23, 31, 6)) < 0.4).astype(np.float64)
    if masks_set == 0:
        masks[..., 0] = 0
    given = [masks.copy(), masks.copy()]
    expected = dafne.calc_aggregated_masks_and_remove_overlap(given[0])
    with fast_preprocessing():
        found = dafne.calc_aggregated_masks_and_remove_overlap(given[1])
    assert found[1] is given[1]
    assert_same_slices(found, expected)


def test_the_cache_folder_serves_the_next_run_and_a_damaged_file_is_computed_again(dafne, tmp_path):
    images, masks = phantom(5)
    expected = prepare(dafne, images, masks)
    for expected_hits in (0, 2, 1):
        cache = BiasFieldCache(tmp_path)
        with fast_preprocessing(cache):
            assert_same_slices(prepare(dafne, images, masks), expected)
        assert cache.hits == expected_hits
        damaged = next(tmp_path.glob("*.npy"))
        if expected_hits == 2:
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")


def test_an_import_inside_a_models_function_meets_the_cache(dafne):
    source = (
        "def correct(image):\n"
        "    import SimpleITK as sitk\n"
        "    image = sitk.Cast(sitk.GetImageFromArray(image), sitk.sitkFloat32)\n"
        "    corrector = sitk.N4BiasFieldCorrectionImageFilter()\n"
        "    corrector.SetMaximumNumberOfIterations([5] * 2)\n"
        "    return sitk.GetArrayFromImage(\n"
        "        corrector.Execute(image, sitk.OtsuThreshold(image, 0, 1, 200))\n"
        "    )\n"
    )
    names = {}
    exec(source, names)
    (image,), _ = phantom(6, slices=1)
    expected = names["correct"](image)
    cache = BiasFieldCache()
    with fast_preprocessing(cache):
        assert names["correct"](image).tobytes() == expected.tobytes()
        assert names["correct"](image).tobytes() == expected.tobytes()
    assert (cache.hits, cache.misses) == (1, 1)


def replaced_names(dafne):
    sitk = pytest.importorskip("SimpleITK")
    return [
        skimage.morphology.area_opening,
        skimage.morphology.area_closing,
        sitk.N4BiasFieldCorrectionImageFilter,
        sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(),
        *(value for value in vars(dafne).values() if callable(value)),
        dafne.biascorrection.biascorrection_image,
    ]


def test_everything_is_put_back_also_after_an_exception(dafne, capsys):
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(2)
    before = replaced_names(dafne)

    def fail():
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 1
        assert sum(a is not b for a, b in zip(replaced_names(dafne), before, strict=True)) >= 7
        sys.stdout.write("Number of labels: 13")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fast_preprocessing(BiasFieldCache(), 2):
        fail()
    assert replaced_names(dafne) == before
    sys.stdout.write("again\n")
    assert capsys.readouterr().out == "again\n"


def test_a_second_block_in_the_same_thread_is_refused_and_harmless(dafne):
    before = replaced_names(dafne)
    with fast_preprocessing():
        with pytest.raises(RunError, match="already on in this thread"), fast_preprocessing():
            pass
        inside = replaced_names(dafne)
    assert inside != before
    assert replaced_names(dafne) == before


def test_another_thread_waits_for_its_turn(dafne):
    before, order = replaced_names(dafne), []

    def other():
        with fast_preprocessing():
            order.append("second")

    with fast_preprocessing():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert replaced_names(dafne) == before


def test_missing_simpleitk_is_said_before_dafne_can_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install SimpleITK-SimpleElastix"), fast_preprocessing():
        pass


def test_a_slice_without_signal_is_refused_in_words(dafne):
    _, masks = phantom(7)
    empty = [np.zeros((44, 44))] * 2
    with pytest.raises(DataError, match="has no signal"), fast_preprocessing(workers=1):
        prepare(dafne, empty, masks)
    with pytest.raises(DataError, match="has no signal"), fast_preprocessing(workers=2):
        prepare(dafne, empty, masks)


def test_a_number_of_workers_that_makes_no_sense_is_refused():
    with pytest.raises(SettingsError, match="at least 1, got 0"), fast_preprocessing(workers=0):
        pass
