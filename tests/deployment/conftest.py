"""A coordinator and two sites on this machine, as processes, with TLS and keys."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dafne_federated.core.volumes import Case
from tests.deployment.bad_network import BadNetwork
from tests.deployment.deployed import Deployment, deployed, free_ports


@pytest.fixture(scope="module")
def network() -> Iterator[BadNetwork]:
    """What lies between sites and coordinator: a good network until a test changes it."""
    with BadNetwork(free_ports()) as between:
        yield between


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory,
    trained: Any,
    make_case: Callable[..., Case],
    network: BadNetwork,
) -> Iterator[Deployment]:
    """A coordinator and its registered sites, all running."""
    path = tmp_path_factory.mktemp("deployment")
    with deployed(path, trained.path, make_case, network=network) as made:
        yield made
