"""A site is told what would keep it from training: data, bases, disk, and what a step costs."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.cli.app import app  # noqa: E402
from dafne_federated.client.base_review import approve_base  # noqa: E402
from dafne_federated.client.deployment_folder import (  # noqa: E402
    Connection,
    SiteFolder,
    make_site,
)
from dafne_federated.client.training_check import check_training  # noqa: E402
from tests.stand_in.coordinator_stand_in import coordinator, write_certificate  # noqa: E402


@pytest.fixture
def site(tmp_path: Path, squares_folder: Path) -> SiteFolder:
    authority = write_certificate(tmp_path / "made.pem", "localhost")
    connection = Connection(coordinator="localhost:1")
    made = make_site(tmp_path / "site", "clinic", connection, authority, squares_folder)
    change(made, "threads = 0", "threads = 2")
    change(made, '"auto"', '"cpu"')
    return made


def change(site: SiteFolder, old: str, new: str) -> None:
    text = site.settings_file.read_text()
    assert old in text
    site.settings_file.write_text(text.replace(old, new))


def test_a_whole_check_ends_well_with_what_a_step_costs(
    site: SiteFolder, trained: Any, tmp_path: Path
) -> None:
    approve_base(site.settings, trained.path.read_bytes(), "test")
    with coordinator(tmp_path / "made.pem") as there:
        change(site, "localhost:1", f"localhost:{there.port}")
        done = CliRunner().invoke(app, ["site", "check", str(site.path), "--json"])
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert done.exit_code == 0, done.stdout
    assert {one["status"] for one in found.values()} <= {"ok", "warn"}
    (step,) = (one for name, one in found.items() if name.startswith("step of Squares"))
    assert " slices on CPU (2 threads)" in step["found"]
    assert "GiB at most" in step["found"]
    assert found["device"]["found"] == "CPU (2 threads)"
    assert found["guard"]["status"] == found["key"]["status"] == "ok"


def test_without_a_coordinator_the_rest_is_checked_and_the_status_is_1(site: SiteFolder) -> None:
    done = CliRunner().invoke(app, ["site", "check", str(site.path)])
    assert done.exit_code == 1
    assert "fail  reach: " in done.stdout
    assert "      -> ask the coordinator whether it runs" in done.stdout
    assert "warn  bases: none is approved here" in done.stdout


def test_data_that_cannot_be_used_are_told_and_no_step_is_tried(
    site: SiteFolder, trained: Any, tmp_path: Path
) -> None:
    approve_base(site.settings, trained.path.read_bytes(), "test")
    first = json.dumps(site.settings.training[0])
    change(site, first, '"gone"')
    _, data = check_training(site.settings)
    assert (data.status, "1 of 8 cases are not in the folder" in data.found) == ("fail", True)
    change(site, '"gone"', first)
    change(site, str(site.settings.data), str(tmp_path / "nowhere"))
    _, data = check_training(site.settings)
    assert data.status == "fail"
    assert data.advice
