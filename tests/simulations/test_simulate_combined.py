"""A run may combine strategies, ranks, pooled statistics and short numbers; its release holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.client.site import Site  # noqa: E402
from dafne_federated.client.site_settings import read_site  # noqa: E402
from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.dataset import open_folder  # noqa: E402
from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.state import state_rank  # noqa: E402
from dafne_federated.server.rounds import first_state  # noqa: E402
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.preparation import (  # noqa: E402
    Simulation,
    keep_site,
    prepare,
)
from dafne_federated.simulations.progress import Stages  # noqa: E402
from dafne_federated.simulations.release_check import load_release_check  # noqa: E402
from dafne_federated.simulations.simulate import simulate  # noqa: E402
from dafne_federated.simulations.test_results import load_test_rows  # noqa: E402
from dafne_federated.simulations.testing import release_difference  # noqa: E402
from tests.simulations.conftest import SETTINGS  # noqa: E402


@pytest.mark.parametrize("strategy", ["alternating", "stack"])
def test_the_release_is_what_was_evaluated_at_whatever_rank(
    run_one: Callable[..., RunFolder], strategy: str
) -> None:
    settings = SETTINGS.model_copy(
        update={"strategy": strategy, "rank": 2, "epochs": 1, "gate": "none"}
    )
    folder = run_one(strategy, settings=settings)
    state = folder.state_after(2)
    assert state_rank(folder.plan(), state) == {"alternating": 2, "stack": 8}[strategy]
    kept = load_release_check(folder)
    assert kept is not None
    assert kept.difference < 1e-5
    assert load_test_rows(folder)


@pytest.mark.parametrize(
    ("changes", "least"),
    [({}, 4), ({"statistics": "pooled", "class_weights": "pooled", "wire": "float16"}, 1.5)],
    ids=["plain", "all-at-once"],
)
def test_sites_of_rank_2_and_16_train_together(
    tmp_path: Path, trained: Any, squares_folder: Path, changes: dict[str, Any], least: float
) -> None:
    Approvals().add(read_model(trained.path), "test")
    settings = SETTINGS.model_copy(update={"max_rank": 16, "epochs": 1, "gate": "none"} | changes)
    simulation = Simulation(
        run=tmp_path / "run",
        data=squares_folder,
        base=trained.path,
        settings=settings,
        local_only=False,
        partition=PartitionSettings(shares=(2, 1, 1)),
    )
    with Stages(quiet=True) as stages:
        prepare(simulation, stages)
        for name, rank in (("clinic", 2), ("hospital", 16)):
            site = read_site(tmp_path / "run" / "sites" / f"{name}.json")
            keep_site(simulation.run, site.model_copy(update={"rank": rank}))
        folder = simulate(simulation, stages)
    lines, plan = folder.rounds(), folder.plan()
    assert [line.whole for line in lines] == [True, False, True]
    for line in lines[:2]:
        small, large = (line.sites[name].bytes_up for name in ("clinic", "hospital"))
        assert least < large / small < 8  # headers, the head and what is pooled have no rank
    assert state_rank(plan, folder.state_after(2)) == plan.rank
    kept = load_release_check(folder)
    assert kept is not None
    assert kept.difference < 1e-5


@pytest.fixture(scope="module")
def pooled(run_one: Callable[..., RunFolder]) -> RunFolder:
    both = {"statistics": "pooled", "class_weights": "pooled"}
    return run_one("pooled", local_only=True, settings=SETTINGS.model_copy(update=both))


def test_a_run_with_pooled_statistics_gains_and_releases_what_was_evaluated(
    pooled: RunFolder, squares_folder: Path
) -> None:
    result, plan = pooled.result(), pooled.plan()
    assert result.released, result.reason
    base, new = read_model(pooled.base), read_model(pooled.release / result.release)
    changed = {k for k in base.weights if not np.array_equal(base.weights[k], new.weights[k])}
    assert changed == {target.key for target in plan.targets}
    assert all((new.weights[variance.key] > 0).all() for _, variance in plan.normalisations)
    folder = open_folder(squares_folder)
    difference = release_difference(pooled, folder.cases[0], folder.labels)
    assert difference is not None
    assert difference < 1e-5
    rows = load_test_rows(pooled)
    means = [np.mean([r.dice for r in rows if r.arm == arm]) for arm in ("base", "federated")]
    assert means[1] > means[0]


def test_the_pool_is_that_of_one_site_with_all_data(pooled: RunFolder) -> None:
    plan, kept = pooled.plan(), pooled.pooled()
    assert kept is not None
    sites = [read_site(path) for path in sorted((pooled.path / "sites").glob("*.json"))]
    names = tuple(name for site in sites for name in site.training)
    everything = Site(sites[0].model_copy(update={"name": "all", "training": names}))
    alone = everything.own_statistics(plan, first_state(pooled.info(), plan))
    federated = pooled.state_after(1)
    for key in plan.state_shapes(trained=False):
        np.testing.assert_allclose(federated[key], alone[key], rtol=1e-5, atol=1e-5)
    counts, slices = everything.class_counts(plan)
    assert kept.classes == counts
    assert sum(site.slices for site in kept.sites.values()) == slices == kept.moments[0].slices
