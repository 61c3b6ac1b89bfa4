"""What many tests share: places, a small network, and a model of ours on disk."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import Running, StandIn

from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import State
from dafne_federated.core.volumes import Case
from tests.squares import Trained, square_case, train_squares

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dafne-models",
        default=os.environ.get("DAFNE_MODELS"),
        help="checkout of Dafne's model generators, for tests of adapters on its own networks",
    )


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images, or a skip with the reason."""
    chosen = os.environ.get("DAFNE_FEDERATED_TEST_DATA")
    if not chosen:
        pytest.skip("set DAFNE_FEDERATED_TEST_DATA to a folder of real images to run this")
    return Path(chosen)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep approvals and caches of tests away from those of the person who runs them."""
    home = tmp_path / "home"
    monkeypatch.setenv("DAFNE_FEDERATED_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def backend() -> None:
    """TensorFlow, quiet and repeatable."""
    from dafne_federated.core.backend import prepare_backend

    prepare_backend(threads=2, device="cpu")


@pytest.fixture
def start_server() -> Iterator[Callable[..., tuple[StandIn, str]]]:
    """A function that starts a stand-in for a Dafne server and returns it with its address."""
    servers = []

    def start(dialect: str = "php", **options: Any) -> tuple[StandIn, str]:
        stand_in = StandIn(dialect)
        servers.append(Running(stand_in, **options))
        return stand_in, servers[-1].address

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """A function that draws a case from a name and a seed."""
    return square_case


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, backend: None) -> Trained:
    return train_squares(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def small_plan() -> AdaptationPlan:
    """A plan with every kind of target, for tests that need no network."""
    return AdaptationPlan(
        base_digest="b" * 64,
        method="lora",
        rank=2,
        max_rank=6,
        scale=0.5,
        labels=("bright", "dark"),
        targets=(
            Target(key="0000", layer="c", kind="conv", shape=(3, 3, 4, 8)),
            Target(key="0002", layer="t", kind="conv-transpose", shape=(2, 2, 5, 8)),
            Target(key="0004", layer="d", kind="dense", shape=(6, 7)),
            Target(key="0006", layer="h", kind="delta", shape=(1, 1, 4, 3)),
        ),
    )


@pytest.fixture(scope="session")
def make_state(small_plan: AdaptationPlan) -> Callable[..., State]:
    """A function that draws a state of ``small_plan`` from a seed, at a rank."""

    def make(seed: int, rank: int | None = None) -> State:
        generator = np.random.default_rng(seed)
        return {
            key: generator.normal(size=shape).astype("float32")
            for key, shape in small_plan.state_shapes(rank).items()
        }

    return make


@pytest.fixture(scope="session")
def statistics_plan(small_plan: AdaptationPlan) -> AdaptationPlan:
    """``small_plan`` with the stored statistics of two normalisations."""
    statistics = (
        Target(key="0008", layer="n", kind="mean", shape=(5,)),
        Target(key="0009", layer="n", kind="variance", shape=(5,)),
        Target(key="0012", layer="m", kind="mean", shape=(3,)),
        Target(key="0013", layer="m", kind="variance", shape=(3,)),
    )
    return small_plan.model_copy(update={"targets": small_plan.targets + statistics})


@pytest.fixture(scope="session")
def make_statistics_state(statistics_plan: AdaptationPlan) -> Callable[..., State]:
    """A function that draws a state of ``statistics_plan`` from a seed."""

    def make(seed: int, rank: int | None = None) -> State:
        generator = np.random.default_rng(seed)
        return {
            key: generator.normal(size=shape).astype("float32")
            for key, shape in statistics_plan.state_shapes(rank).items()
        }

    return make


@pytest.fixture(scope="session")
def squares_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of eight persons at two sites that differ in contrast."""
    from dataclasses import replace

    from dafne_federated.core.volumes import write_nifti_pair

    path = tmp_path_factory.mktemp("squares")
    rows = ["subject,image,label,person,site"]
    for site, strength in (("clinic", 0.45), ("hospital", 0.35)):
        for number in range(4):
            case = square_case(f"{site}-{number}", 100 + number)
            image = (100 + (case.image - 100) * strength).astype(np.float32)
            case = replace(case, image=image, site=site)
            files = (f"images/{case.name}.nii.gz", f"labels/{case.name}.nii.gz")
            write_nifti_pair(case, path / files[0], path / files[1], {1: "bright", 2: "dark"})
            rows.append(f"{case.name},{files[0]},{files[1]},{case.name},{site}")
    (path / "participants.csv").write_text("\n".join(rows) + "\n")
    (path / "dataset.json").write_text(
        '{"name": "Squares", "labels": {"1": "bright", "2": "dark"}}'
    )
    return path


@pytest.fixture(scope="session")
def bundles_folder(tmp_path_factory: pytest.TempPathFactory, squares_folder: Path) -> Path:
    """The persons of ``squares_folder`` as Dafne's desktop program exports them, side named.

    Source: ``prepare_numpy_bundle`` in ``MuscleSegmentation.py`` of the dafne repository: grey
    values as they were loaded, three lengths, a comment, a mask for each region, no affine.
    """
    from dafne_federated.core.dataset import load_case, open_folder

    path = tmp_path_factory.mktemp("bundles")
    squares = open_folder(squares_folder)
    for ref in squares.cases:
        case = load_case(ref, squares.labels)
        masks = {f"mask_{name}_R": mask.astype(np.uint8) for name, mask in case.masks.items()}
        np.savez_compressed(
            path / f"{ref.name}.npz",
            data=case.image,
            resolution=np.array(case.spacing),
            comment="",  # type: ignore[arg-type]
            **masks,
        )
    return path
