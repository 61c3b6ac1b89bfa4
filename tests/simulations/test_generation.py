"""Sites that measure in earnest say of a second version what its start and the base leave."""

import json
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.client.app import app as client_app  # noqa: E402
from dafne_federated.core.paired_changes import Changes  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.server.continuous import run_generation  # noqa: E402
from dafne_federated.server.generation import (  # noqa: E402
    GenerationInfo,
    make_generation,
    versions,
)
from dafne_federated.simulations.inline_engine import InlineGrid  # noqa: E402


def totals(changes: Changes) -> dict[str, float]:
    return {label: change.total for label, change in changes.items()}


def test_what_a_release_gained_and_a_version_after_it_is_what_is_said_against_the_base(
    done: RunFolder, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done.path, run, ignore=shutil.ignore_patterns("rounds*", "check*", "res*"))
    folder = RunFolder(run)
    make_generation(folder, GenerationInfo(every=1))
    sites = {path: json.loads(path.read_text()) for path in (run / "sites").glob("*.json")}
    for path, settings in sites.items():
        path.write_text(json.dumps(settings | {"training": settings["training"][1:]}))
    grid = InlineGrid(client_app, len(sites), {"run": str(run)})

    def new_cases(_seconds: float) -> None:
        for path, settings in sites.items():
            path.write_text(json.dumps(settings))

    run_generation(grid, folder, 2, new_cases)
    first, second = versions(folder)
    result = first.result()
    assert result.released, result.reason
    assert result.round is not None
    released, lines = first.rounds()[result.round], second.rounds()
    for name, before in released.sites.items():
        assert not before.accept_base
        start = lines[0].sites[name]
        assert set(totals(start.accept).values()) == {0.0}
        assert totals(start.accept_base) == pytest.approx(totals(before.accept), abs=1e-9)
        for line in lines[1:]:
            site = line.sites[name]
            assert site.accept.keys() == site.accept_base.keys() == before.accept.keys()
            for label, gained in totals(before.accept).items():
                whole = gained + site.accept[label].total
                assert site.accept_base[label].total == pytest.approx(whole, abs=1e-9)
    decision = second.result().decision
    assert decision is not None
    assert decision.against == "start"
    assert (decision.base is not None) >= decision.accepted
