"""A release reaches the Dafne desktop program whole: shown, applied, retrained and adopted again.

The calls are those that the program makes, with its own classes for models on this machine and on
a server: a class is ``Name`` or ``Name, Variant``, ``apply`` gets one slice and
``incremental_learn`` the slices of one examination, in batches of five.

Source: ``MuscleSegmentation.py`` and ``ModelBrowser.py`` of the dafne repository, read for what
they call and with which arguments.
"""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import KEY, START, StandIn
from pydantic import SecretStr

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.adopted_state import adopt  # noqa: E402
from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.function_sources import with_constants  # noqa: E402
from dafne_federated.core.metrics import dice  # noqa: E402
from dafne_federated.core.model_file import (  # noqa: E402
    ModelFile,
    parse_model,
    read_model,
    write_model,
)
from dafne_federated.core.model_runtime import RunningModel  # noqa: E402
from dafne_federated.core.new_run import make_plan  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.core.state import check_state  # noqa: E402
from dafne_federated.server.dafne_connection import DafneConnection  # noqa: E402
from dafne_federated.server.publication import publish  # noqa: E402
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.preparation import Simulation  # noqa: E402
from dafne_federated.simulations.progress import Stages  # noqa: E402
from dafne_federated.simulations.simulate import simulate  # noqa: E402
from tests.simulations.conftest import SETTINGS  # noqa: E402

CLASSES = ["Squares", "Squares, Left", "Squares, Right"]
SHOWN = {
    "variants": ["", "Left", "Right"],
    "categories": [["MSK", "Muscle"], ["MRI", "Axial"]],
    "orientation": "Axial",
    "dimensionality": "2",
    "model_name": "Squares",
    "model_type": "DynamicDLModel",
}


@pytest.fixture(scope="module")
def sided(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base for right sides that mirrors left ones, and says all that Dafne shows."""
    file = read_model(trained.path)
    functions = {
        key: with_constants(str(source), {"SIDES": True})
        for key, source in file.functions.items()
        if key in ("apply_model_function", "incremental_learn_function")
    }
    path = tmp_path_factory.mktemp("sided") / "base.model"
    metadata = {**file.metadata, **SHOWN}
    write_model(replace(file, functions={**file.functions, **functions}, metadata=metadata), path)
    return path


@pytest.fixture(scope="module")
def run(sided: Path, bundles_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A federation of two sites on what the program exported, from that base."""
    os.environ["DAFNE_FEDERATED_HOME"] = str(tmp_path_factory.mktemp("home"))
    Approvals().add(read_model(sided), "test")
    options = Simulation(
        run=tmp_path_factory.mktemp("runs") / "run",
        data=bundles_folder,
        base=sided,
        settings=SETTINGS.model_copy(update={"gate": "none"}),
        local_only=False,
        partition=PartitionSettings(sites=2, shares=(2, 1, 1)),
    )
    with Stages(quiet=True) as stages:
        return simulate(options, stages)


@pytest.fixture(scope="module")
def release(run: RunFolder) -> Path:
    result = run.result()
    assert result.released, result.reason
    return run.release / result.release


@pytest.fixture
def local(release: Path, tmp_path: Path) -> Any:
    """The program's models on this machine, after 'Import model'."""
    from dafne_dl import LocalModelProvider

    for name in ("models", "data"):
        (tmp_path / name).mkdir()
    provider = LocalModelProvider(str(tmp_path / "models"), str(tmp_path / "data"))
    provider.import_model(str(release), "Squares")
    return provider


@pytest.fixture
def server(sided: Path, release: Path, start_server: Callable[..., Any]) -> tuple[StandIn, str]:
    """A Dafne server with the base, on which the release was published."""
    stand_in, address = start_server()
    stand_in.models = {"Squares": {str(START): sided.read_bytes()}}
    stand_in.about = {"Squares": dict(read_model(sided).metadata)}
    stand_in.may_merge = {"Squares"}
    with DafneConnection(address, SecretStr(KEY)) as connection:
        base = read_model(sided).digest
        publish(connection, "Squares", release.read_bytes(), base, part_bytes=20_000, pause=0.0)
    return stand_in, address


@pytest.fixture
def remote(server: tuple[StandIn, str], tmp_path: Path) -> Any:
    from dafne_dl import RemoteModelProvider

    for name in ("got", "upload"):
        (tmp_path / name).mkdir()
    return RemoteModelProvider(str(tmp_path / "got"), server[1], KEY, str(tmp_path / "upload"))


def classes(provider: Any) -> list[str]:
    """What the program offers to choose from: each variant of each model."""
    return [
        f"{name}, {variant}" if variant.strip() else name
        for name in provider.available_models()
        for variant in provider.model_details(name)["variants"]
    ]


def labels(model: Any, image: Any, **options: Any) -> Any:
    return model.apply({"image": image, "resolution": [1.0, 1.0], **options})


@pytest.mark.parametrize("where", ["local", "remote"])
def test_it_is_shown_with_variants_and_categories(
    request: pytest.FixtureRequest, where: str
) -> None:
    provider = request.getfixturevalue(where)
    assert classes(provider) == CLASSES
    details = provider.model_details("Squares")
    assert {key: details[key] for key in SHOWN} == SHOWN


def test_the_file_beside_it_says_the_same_to_who_copies_both(release: Path, tmp_path: Path) -> None:
    from dafne_dl import LocalModelProvider

    shutil.copytree(release.parent, tmp_path / "copied")
    provider = LocalModelProvider(str(tmp_path / "copied"), str(tmp_path))
    assert classes(provider) == CLASSES
    details = provider.model_details("Squares")
    assert {key: details[key] for key in SHOWN} == SHOWN
    assert details["can_incremental_learn"] is True


def test_going_back_is_taking_the_newer_file_away(
    sided: Path, release: Path, local: Any, tmp_path: Path
) -> None:
    local.import_model(str(sided), "Squares")
    assert local.load_model("Squares").timestamp_id == read_model(release).timestamp_id
    sorted((tmp_path / "models").glob("Squares_*.model"))[-1].rename(tmp_path / "newer.model")
    assert local.load_model("Squares").timestamp_id == read_model(sided).timestamp_id


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ({}, ""),  # a Dafne server, while it evaluates
        ({"classification": "Squares", "split_laterality": True}, ""),
        ({"classification": "Squares, Left", "split_laterality": True}, "_L"),
        ({"classification": "Squares, Right", "split_laterality": True}, "_R"),
        ({"classification": "Squares, Left", "split_laterality": False}, ""),
        ({"classification": "Squares, Right"}, ""),
    ],
    ids=str,
)
def test_sides_are_split_as_the_base_splits_them(
    sided: Path, local: Any, make_case: Callable[..., Any], options: Any, suffix: str
) -> None:
    from dafne_dl.model_loaders import generic_load_model

    image = make_case("new", 5).image[..., 0]
    found = labels(local.load_model("Squares"), image, **options)
    with sided.open("rb") as file:
        base = generic_load_model(file, install_deps=False)
    assert set(found) == {f"bright{suffix}", f"dark{suffix}"} == set(labels(base, image, **options))


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_left_side_is_found_where_its_mirror_image_has_a_right_one(
    request: pytest.FixtureRequest, where: str, make_case: Callable[..., Any]
) -> None:
    model = request.getfixturevalue(where).load_model("Squares")
    case = make_case("new", 6)
    image = case.image[..., 0]
    right = labels(model, image, classification="Squares, Right")
    left = labels(model, image[:, ::-1], classification="Squares, Left", split_laterality=True)
    for name, truth in case.masks.items():
        mirrored = left[f"{name}_L"][:, ::-1]
        assert dice(truth[..., 0], right[name] > 0) > 0.8
        assert dice(mirrored > 0, right[name] > 0) > 0.95


def retrain(model: Any, case: Any, name: str, suffix: str) -> None:
    """Do what the program does when the results of one examination are saved."""
    assert model.can_incremental_learn()
    slices = range(case.image.shape[-1])
    region = np.zeros(case.image.shape[:2], np.uint8)  # of the user's own, unknown to the model
    model.incremental_learn(
        {
            "image_list": [case.image[..., index] for index in slices],
            "resolution": [1.0, 1.0],
            "classification": name,
        },
        [
            {f"{label}{suffix}": m[..., index].astype(np.uint8) for label, m in case.masks.items()}
            | {"region": region}
            for index in slices
        ],
        bs=5,
        minTrainImages=5,
    )
    model.reset_timestamp()


def check_retrained(release: Path, retrained: ModelFile, approvals: Approvals) -> None:
    """What came back is a newer version of the release, and can be adopted."""
    before = read_model(release)
    assert retrained.model_id == before.model_id
    assert retrained.functions == before.functions
    assert retrained.timestamp_id > before.timestamp_id
    assert retrained.metadata["federated"] == before.metadata["federated"]
    assert {key: retrained.metadata[key] for key in SHOWN} == SHOWN
    approvals.add(before, "test")
    plan = make_plan(RunningModel(before, approvals), RunSettings(rank=4, max_rank=16))
    adopted = adopt(before, retrained, plan, 16)
    assert adopted.share == pytest.approx(1)  # no kernel of this network has a larger rank
    assert 0.5 < adopted.whole < 1  # biases are not part of the plan
    check_state(plan, adopted.state)


def test_it_is_retrained_there_saved_and_read_here(
    release: Path, local: Any, tmp_path: Path, make_case: Callable[..., Any]
) -> None:
    model = local.load_model("Squares")
    case = make_case("new", 7, slices=5)
    case = replace(
        case,
        image=case.image[:, ::-1],
        masks={label: mask[:, ::-1] for label, mask in case.masks.items()},
    )
    retrain(model, case, "Squares, Left", "_L")
    local.upload_model("Squares", model, 0.9)
    newest = sorted((tmp_path / "models").glob("Squares_*.model"))[-1]
    assert local.load_model("Squares").timestamp_id == read_model(newest).timestamp_id
    check_retrained(release, read_model(newest), Approvals(tmp_path / "approved.json"))


def test_it_is_retrained_there_and_sent_to_the_server(
    server: tuple[StandIn, str],
    release: Path,
    remote: Any,
    tmp_path: Path,
    make_case: Callable[..., Any],
) -> None:
    model = remote.load_model("Squares")
    retrain(model, make_case("new", 8, slices=5), "Squares, Right", "_R")
    before = set(threading.enumerate())
    remote.upload_model("Squares", model, 0.9)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    ((_, _, _, data),) = server[0].pending
    check_retrained(release, parse_model(data), Approvals(tmp_path / "approved.json"))
