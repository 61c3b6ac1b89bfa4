"""Whole simulations of two small sites, one of them for many tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.model_file import read_model
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.simulations.partition import PartitionSettings
from dafne_federated.simulations.preparation import Simulation
from dafne_federated.simulations.progress import Stages
from dafne_federated.simulations.simulate import simulate

SETTINGS = RunSettings(
    rounds=2, epochs=3, threads=2, device="cpu", margin=0.2, min_persons=1, max_rank=8
)


@pytest.fixture(scope="session")
def run_one(
    tmp_path_factory: pytest.TempPathFactory, trained: Any, squares_folder: Path
) -> Callable[..., RunFolder]:
    def run(name: str, **changes: Any) -> RunFolder:
        os.environ["DAFNE_FEDERATED_HOME"] = str(tmp_path_factory.mktemp("home"))
        Approvals().add(read_model(trained.path), "test")
        options = {
            "run": tmp_path_factory.mktemp("runs") / name,
            "data": squares_folder,
            "base": trained.path,
            "settings": SETTINGS,
            "local_only": False,
            "partition": PartitionSettings(shares=(2, 1, 1)),
        } | changes
        with Stages(quiet=True) as stages:
            return simulate(Simulation(**options), stages)

    return run


@pytest.fixture(scope="session")
def done(run_one: Callable[..., RunFolder]) -> RunFolder:
    return run_one("inline", local_only=True)
