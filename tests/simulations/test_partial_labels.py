"""A site that lacks a label costs the others little, and its own persons keep the label."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.errors import SettingsError  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.test_results import load_test_rows  # noqa: E402
from tests.simulations.conftest import SETTINGS  # noqa: E402

# One site has half of the persons, so that what it does to a label can be seen.
THREE = {"sites": 3, "sizes": (4, 2, 2), "shares": (2, 1, 1)}
WITHOUT = {"site-1": ("dark",)}


@dataclass(frozen=True)
class Runs:
    full: RunFolder
    masked: RunFolder
    naive: RunFolder

    def dice(self, name: str, label: str, arm: str = "federated") -> float:
        rows = load_test_rows(getattr(self, name))
        own = [r.dice for r in rows if (r.arm, r.site, r.label) == (arm, "site-1", label)]
        return float(np.mean(own))


@pytest.fixture(scope="module")
def runs(run_one: Callable[..., RunFolder]) -> Runs:
    settings = SETTINGS.model_copy(update={"rounds": 3, "gate": "none"})

    def run(name: str, **more: Any) -> RunFolder:
        partition = PartitionSettings(**THREE, **more)
        return run_one(name, settings=settings, partition=partition, local_only=True)

    full, masked = run("full"), run("masked", without=WITHOUT)
    with pytest.MonkeyPatch.context() as patch:  # the same code, with both masks switched off
        patch.setattr("dafne_federated.client.site.marginal_loss", lambda loss, *_: loss)
        patch.setattr("dafne_federated.strategies.update_gate.missing_columns", lambda *_: {})
        return Runs(full, masked, run("naive", without=WITHOUT))


def test_the_label_is_learned_from_the_others_and_not_as_background(runs: Runs) -> None:
    full, masked, naive = (runs.dice(name, "dark") for name in ("full", "masked", "naive"))
    assert masked > full - 0.05
    assert masked > naive


def test_a_site_alone_does_not_unlearn_what_it_lacks(runs: Runs) -> None:
    masked, naive = (runs.dice(name, "dark", "local only") for name in ("masked", "naive"))
    assert masked > naive + 0.1
    assert runs.dice("masked", "bright", "local only") > runs.dice("masked", "bright", "base")


def test_the_label_that_is_there_is_learned_as_ever(runs: Runs) -> None:
    full, masked = (runs.dice(name, "bright") for name in ("full", "masked"))
    assert masked > full - 0.05


def test_each_round_says_what_a_site_lacks_and_so_does_the_report(runs: Runs) -> None:
    for line in runs.masked.rounds():
        assert {name: site.lacks for name, site in line.sites.items()} == {
            "site-1": ("dark",),
            "site-2": (),
            "site-3": (),
        }
        assert line.sites["site-1"].dice["dark"] is None
    assert "site-1 did not annotate dark" in runs.masked.report.read_text()
    assert "did not annotate" not in runs.full.report.read_text()
    assert runs.masked.plan().output == tuple(t.key for t in runs.masked.plan().targets[-2:])


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ({"site-4": ("dark",)}, r"without: expected one of the sites .*, got 'site-4'"),
        ({"site-1": ("grey",)}, "site 'site-1': expected labels of the data, .*, got 'grey'"),
        ({"site-1": ("dark", "bright")}, "expected a label that is left"),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    run_one: Callable[..., RunFolder], without: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        run_one("refused", partition=PartitionSettings(**THREE, without=without))
