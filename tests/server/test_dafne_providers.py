"""The real Dafne downloads, imports and applies what was published, and speaks to the stand-in."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import KEY, START, StandIn, digest
from pydantic import SecretStr

from dafne_federated.core.merged_model import adapted_model
from dafne_federated.core.model_file import ModelFile, read_model, serialise_model
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.state import State
from dafne_federated.core.volumes import Case
from dafne_federated.server.dafne_connection import DafneConnection
from dafne_federated.server.dafne_download import pull
from dafne_federated.server.dafne_server import list_models, model_versions
from dafne_federated.server.publication import publish

pytestmark = pytest.mark.slow


@pytest.fixture
def server(trained: Any, start_server: Callable[..., Any]) -> tuple[StandIn, str]:
    stand_in, address = start_server()
    stand_in.models = {"Squares": {str(START): trained.path.read_bytes()}}
    stand_in.may_merge = {"Squares"}
    return stand_in, address


def folded(base: ModelFile) -> ModelFile:
    """The base with a small change of its output layer."""
    *_, kernel, bias = sorted(base.weights)
    shapes = {key: base.weights[key].shape for key in (kernel, bias)}
    plan = AdaptationPlan(
        base_digest=base.digest,
        method="head",
        rank=1,
        max_rank=1,
        scale=1.0,
        labels=("bright", "dark"),
        targets=tuple(
            Target(key=key, layer="head", kind="delta", shape=shape)
            for key, shape in shapes.items()
        ),
    )
    state: State = {
        f"{key}/delta": np.full(shape, 0.01, np.float32) for key, shape in shapes.items()
    }
    model = adapted_model(base, plan, state, base.timestamp_id + 1)
    return replace(
        model, metadata={**model.metadata, "federated": {"base_sha256": base.digest, "rounds": 1}}
    )


@pytest.fixture
def published(server: tuple[StandIn, str], tmp_path: Path) -> bytes:
    """The bytes of a new version, after the full circle: list, pull, adapt, push, verify."""
    with DafneConnection(server[1], SecretStr(KEY)) as connection:
        assert list_models(connection) == ["Squares"]
        there = model_versions(connection, "Squares")
        base = read_model(pull(connection, there))
        data = serialise_model(folded(base))
        done = publish(connection, "Squares", data, base.digest, part_bytes=20_000, pause=0.0)
        now = model_versions(connection, "Squares")
    assert now.latest == done.version > there.latest
    assert now.digests[now.latest] == digest(data)
    return data


@pytest.fixture
def remote(server: tuple[StandIn, str], tmp_path: Path) -> Any:
    from dafne_dl import RemoteModelProvider

    (tmp_path / "upload").mkdir()
    return RemoteModelProvider(str(tmp_path / "got"), server[1], KEY, str(tmp_path / "upload"))


def masks(model: Any, case: Case) -> dict[str, Any]:
    data = {"image": case.image[..., 0], "resolution": np.ones(2)}
    found: dict[str, Any] = model.apply(data)
    return found


def test_dafnes_remote_provider_downloads_and_applies_the_new_version(
    published: bytes, remote: Any, make_case: Callable[..., Case], tmp_path: Path
) -> None:
    assert remote.available_models() == ["Squares"]
    model = remote.load_model("Squares")
    (file,) = (tmp_path / "got").glob("*.model")
    assert file.read_bytes() == published
    assert model.metadata["federated"]["rounds"] == 1
    assert set(masks(model, make_case("new", 5))) == {"bright", "dark"}


def test_the_version_before_it_is_still_there(published: bytes, remote: Any, trained: Any) -> None:
    old = remote.load_model("Squares", timestamp=START)
    assert old.timestamp_id == read_model(trained.path).timestamp_id


def test_dafnes_local_provider_imports_what_was_pulled(
    published: bytes,
    server: tuple[StandIn, str],
    make_case: Callable[..., Case],
    tmp_path: Path,
) -> None:
    from dafne_dl import LocalModelProvider

    with DafneConnection(server[1], SecretStr(KEY)) as connection:
        file = pull(connection, model_versions(connection, "Squares"))
    (tmp_path / "local").mkdir()
    provider = LocalModelProvider(str(tmp_path / "local"), str(tmp_path / "upload"))
    provider.import_model(str(file), "Squares")
    assert provider.available_models() == ["Squares"]
    model = provider.load_model("Squares")
    got = [np.asarray(array) for array in model.get_weights()]
    want = read_model(file).weights
    assert len(got) == len(want)
    for array, key in zip(got, sorted(want), strict=True):
        np.testing.assert_array_equal(array, want[key])
    assert set(masks(model, make_case("new", 5))) == {"bright", "dark"}
    assert provider.model_details("Squares")["federated"]["rounds"] == 1


def test_the_stand_in_takes_what_dafnes_own_client_uploads(
    server: tuple[StandIn, str], remote: Any
) -> None:
    model = remote.load_model("Squares")
    before = set(threading.enumerate())
    remote.upload_model("Squares", model, 0.75)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    ((name, _, dice, data),) = server[0].pending
    assert (name, float(dice)) == ("Squares", 0.75)
    (sent,) = server[0].routes("upload_model")
    assert sent["hash"] == digest(data)
    assert sent["filename"].endswith(".model")
