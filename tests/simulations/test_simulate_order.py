"""In whatever order sites answer, and whichever of them train, the release is the same or there."""

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from flwr.app import Context, Message, RecordDict  # noqa: E402

from dafne_federated.client.app import app as client_app  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.core.strategy_table import STRATEGY_TABLE  # noqa: E402
from dafne_federated.server.app import app as server_app  # noqa: E402
from dafne_federated.simulations.inline_engine import InlineGrid  # noqa: E402
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.simulate import site_folders  # noqa: E402
from dafne_federated.simulations.test_results import load_test_rows  # noqa: E402
from dafne_federated.simulations.testing import personal_states  # noqa: E402
from tests.simulations.conftest import SETTINGS  # noqa: E402


class ShuffledGrid(InlineGrid):
    """Lets sites work and answer in an order of its own in every look."""

    def __init__(self, sites: int, config: dict[str, Any], seed: int) -> None:
        super().__init__(client_app, sites, config)
        self._order = random.Random(seed)
        self.handled: list[int] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        mixed = list(message_ids)
        self._order.shuffle(mixed)
        replies = list(super().pull_messages(mixed))
        self.handled += [reply.metadata.src_node_id for reply in replies]
        return replies


def test_the_order_in_which_sites_work_does_not_change_a_bit(
    done: RunFolder, tmp_path: Path
) -> None:
    orders = []
    for seed in (1, 3):
        run = tmp_path / f"run{seed}"
        shutil.copytree(done.path, run, ignore=shutil.ignore_patterns("rounds*", "check*", "res*"))
        config = {"run": str(run)}
        grid = ShuffledGrid(2, config, seed)
        server_app(grid, Context(1, 1, {}, RecordDict(), config))
        assert RunFolder(run).result().content_digest == done.result().content_digest
        orders.append(grid.handled)
    assert orders[0] != orders[1]


def test_two_of_four_sites_in_a_round_end_in_a_release(
    run_one: Callable[..., RunFolder],
) -> None:
    settings = SETTINGS.model_copy(update={"sites_per_round": 2, "rounds": 3, "gate": "none"})
    folder = run_one(
        "sampled", settings=settings, partition=PartitionSettings(divide=2, shares=(2, 1, 1))
    )
    assert folder.result().released
    for line in folder.rounds()[:3]:
        assert len(line.sites) == 4
        assert sum(site.asked for site in line.sites.values()) == 2
        assert sum(site.training_cases > 0 for site in line.sites.values()) == 2
    assert "ok, measured only" in folder.report.read_text()


def test_with_factors_of_their_own_each_site_is_tested_with_its_model(
    run_one: Callable[..., RunFolder],
) -> None:
    settings = RunSettings(**SETTINGS.model_dump() | {"strategy": "shared-a"})
    folder = run_one("personal", settings=settings)
    assert not folder.result().released
    assert not STRATEGY_TABLE["shared-a"].common
    own = personal_states(folder, site_folders(folder))
    assert own.keys() == {"clinic", "hospital"}
    one, other = own.values()
    factors = [key for key in one if key.endswith("/b")]
    assert all(one[key].any() for key in factors)
    assert all((one[key] != other[key]).any() for key in factors)
    assert {row.arm for row in load_test_rows(folder)} == {"base", "federated"}
    assert "each site's own model" in folder.report.read_text()
