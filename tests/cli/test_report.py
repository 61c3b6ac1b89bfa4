"""`report` writes the report of a run again and says where it is."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli.report import report
from dafne_federated.core.errors import RunError
from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.run_folder import RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(report)
    return app


def test_the_report_of_a_run_is_written_again(tmp_path: Path, app: typer.Typer) -> None:
    folder = _run(tmp_path)
    folder.report.write_text("old")
    done = CliRunner().invoke(app, [str(tmp_path)])
    assert done.exit_code == 0
    assert done.output == f"{folder.report}\n"
    assert "Federated adaptation of Limb" in folder.report.read_text(encoding="utf-8")


def test_a_folder_without_a_run_is_an_error_of_ours(tmp_path: Path, app: typer.Typer) -> None:
    done = CliRunner().invoke(app, [str(tmp_path)])
    assert isinstance(done.exception, RunError)
    assert not (tmp_path / "report.html").exists()


def test_help_shows_an_example(app: typer.Typer) -> None:
    assert "dafne-federated report runs/demo" in CliRunner().invoke(app, ["--help"]).output


def _run(path: Path) -> RunFolder:
    target = Target(key="0000", layer="head", kind="delta", shape=(2,))
    plan = AdaptationPlan(
        base_digest=sha256(b"base"),
        method="head",
        rank=1,
        max_rank=1,
        scale=1.0,
        labels=("muscle",),
        targets=(target,),
    )
    info = RunInfo(
        run="0" * 32,
        created=1_700_000_000,
        base_digest=plan.base_digest,
        base_name="Limb",
        plan_digest=plan.digest,
        settings=RunSettings(),
        versions={},
        command="dafne-federated simulate",
    )
    return RunFolder.create(path, info, plan, b"base")
