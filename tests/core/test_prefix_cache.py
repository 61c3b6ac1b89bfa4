"""Features are computed once, kept within a bound, and never used after what they depend on."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("keras")

from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.prefix_cache import PrefixCache, features_key  # noqa: E402
from dafne_federated.core.slices import PreparedSlices  # noqa: E402

SHAPES = ((2, 2, 1), (3,))
SLICE_BYTES = 4 * (4 + 3)


@dataclass
class Network:
    """Stands in for a cut network: features are the mean of the image, times 1 and 2."""

    plan: AdaptationPlan
    weights_digest: str = "w"
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    slice_bytes: int = SLICE_BYTES
    batches: list[int] = field(default_factory=list)

    def features(self, inputs: np.ndarray) -> list[np.ndarray]:
        self.batches.append(len(inputs))
        means = inputs[..., 0].mean(axis=(1, 2))
        return [
            np.stack([np.full(shape, (index + 1) * mean, np.float32) for mean in means])
            for index, shape in enumerate(self.shapes)
        ]


@pytest.fixture
def network(small_plan: AdaptationPlan) -> Network:
    return Network(small_plan)


def some_slices(count: int = 6, seed: int = 0) -> PreparedSlices:
    generator = np.random.default_rng(seed)
    return PreparedSlices(
        images=generator.normal(size=(count, 4, 4)).astype(np.float32),
        labels=generator.integers(0, 3, (count, 4, 4), np.uint8),
        weights=generator.uniform(size=(count, 4, 4)).astype(np.float32),
        channels=3,
    )


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_each_slice_gets_its_own_features_and_targets(
    tmp_path: Path, network: Network, count: int
) -> None:
    slices = some_slices(count)
    cached = PrefixCache(tmp_path / "cache", 1).slices(network, slices)  # type: ignore[arg-type]
    assert cached is not None
    assert len(cached) == count
    means = slices.images.mean(axis=(1, 2))
    for feature, factor in zip(cached.features, (1, 2), strict=True):
        np.testing.assert_allclose(feature.reshape(count, -1).mean(axis=1), factor * means, 1e-5)
    chosen = np.array([count - 1, 0])
    features, targets = cached.batch(chosen)
    for made, kept in zip(features, cached.features, strict=True):
        np.testing.assert_array_equal(np.asarray(made), kept[chosen])
    np.testing.assert_array_equal(targets, slices.batch(chosen)[1])
    assert len(set(network.batches)) == 1  # one size, so one compiled function
    assert max(network.batches) <= 5
    assert count <= sum(network.batches) < count + len(network.batches)


def test_features_are_computed_once(tmp_path: Path, network: Network) -> None:
    slices = some_slices()
    first = PrefixCache(tmp_path, 1).slices(network, slices)  # type: ignore[arg-type]
    again = PrefixCache(tmp_path, 1).slices(network, some_slices())  # type: ignore[arg-type]
    assert len(network.batches) == 2
    assert first is not None
    assert again is not None
    for one, other in zip(first.features, again.features, strict=True):
        np.testing.assert_array_equal(one, other)
        assert isinstance(other, np.memmap)


def test_whatever_they_depend_on_makes_them_new(network: Network) -> None:
    slices = some_slices()
    plan = network.plan
    fewer = plan.model_copy(update={"targets": plan.targets[1:]})
    narrower = plan.model_copy(
        update={
            "targets": (plan.targets[0].model_copy(update={"inputs": (0, 2)}), *plan.targets[1:])
        }
    )
    image, weights = slices.images.copy(), slices.weights.copy()
    image[0, 0, 0] += 1
    weights[0, 0, 0] += 1
    keys = [
        features_key(changed, given)  # type: ignore[arg-type]
        for changed, given in [
            (network, slices),
            (replace(network, weights_digest="other"), slices),
            (replace(network, plan=fewer), slices),
            (replace(network, plan=narrower), slices),
            (replace(network, plan=plan.model_copy(update={"base_digest": "c" * 64})), slices),
            (network, replace(slices, images=image)),
            (network, replace(slices, weights=weights)),
            (network, some_slices(5)),
        ]
    ]
    assert len(set(keys)) == len(keys)


def test_rank_and_labels_do_not_matter(network: Network) -> None:
    slices = some_slices()
    key = features_key(network, slices)  # type: ignore[arg-type]
    other = network.plan.model_copy(update={"rank": 5, "labels": ("x", "y")})
    relabelled = replace(slices, labels=1 - slices.labels)
    changed = replace(network, plan=other)
    assert features_key(changed, relabelled) == key  # type: ignore[arg-type]


def test_above_the_bound_there_is_no_cache(
    tmp_path: Path, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    bound = (6 * SLICE_BYTES - 1) / 2**20
    with caplog.at_level(logging.INFO):
        assert PrefixCache(tmp_path, bound).slices(network, some_slices()) is None  # type: ignore[arg-type]
    assert "MiB are needed" in caplog.text
    assert "are allowed; training without it" in caplog.text
    assert not network.batches


def test_the_size_is_announced_before_it_is_taken(
    tmp_path: Path, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    big = replace(network, shapes=((512, 512),), slice_bytes=2**20)
    with caplog.at_level(logging.INFO):
        assert PrefixCache(tmp_path, 6.5).slices(big, some_slices()) is not None  # type: ignore[arg-type]
    assert "prefix cache: keeping 6.0 MiB" in caplog.text


def test_what_was_not_used_for_the_longest_time_makes_room(
    tmp_path: Path, network: Network
) -> None:
    big = replace(network, shapes=((256, 512),), slice_bytes=2**19)
    cache = PrefixCache(tmp_path, 2.1)
    sets = [some_slices(2, seed) for seed in range(3)]
    names = [features_key(big, slices) for slices in sets]  # type: ignore[arg-type]
    for age, slices in enumerate(sets[:2]):
        cache.slices(big, slices)  # type: ignore[arg-type]
        os.utime(tmp_path / names[age], (age, age))
    cache.slices(big, sets[0])  # type: ignore[arg-type]
    cache.slices(big, sets[2])  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2]}
    cache.slices(big, sets[1])  # type: ignore[arg-type]
    assert big.batches == [2, 2, 2, 2]


@pytest.mark.parametrize("damage", ["cut", "gone", "other shape"])
def test_damaged_features_are_computed_anew(tmp_path: Path, network: Network, damage: str) -> None:
    cache, slices = PrefixCache(tmp_path, 1), some_slices()
    cached = cache.slices(network, slices)  # type: ignore[arg-type]
    assert cached is not None
    expected = [np.array(feature) for feature in cached.features]
    del cached
    file = tmp_path / features_key(network, slices) / "1.npy"  # type: ignore[arg-type]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "gone":
        file.unlink()
    else:
        np.save(file, np.zeros((6, 4), np.float32))
    again = cache.slices(network, slices)  # type: ignore[arg-type]
    assert again is not None
    for feature, old in zip(again.features, expected, strict=True):
        np.testing.assert_array_equal(feature, old)
    assert len(network.batches) == 4


def test_an_interrupted_filling_leaves_nothing_to_be_used(tmp_path: Path, network: Network) -> None:
    class Interrupted(Network):
        def features(self, inputs: np.ndarray) -> list[np.ndarray]:
            if self.batches:
                raise KeyboardInterrupt
            return super().features(inputs)

    cache, slices = PrefixCache(tmp_path, 1), some_slices()
    with pytest.raises(KeyboardInterrupt):
        cache.slices(Interrupted(network.plan), slices)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert cache.slices(network, slices) is not None  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_means_no_cache(
    tmp_path: Path, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = PrefixCache(tmp_path / "file" / "cache", 1)
    assert cache.slices(network, some_slices()) is None  # type: ignore[arg-type]
    assert "training without it" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_others_cannot_look_into_it(tmp_path: Path, network: Network) -> None:
    PrefixCache(tmp_path / "cache", 1).slices(network, some_slices())  # type: ignore[arg-type]
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
