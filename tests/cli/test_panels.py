"""Options of a long command stand under headings."""

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from dafne_federated.cli.app import app
from dafne_federated.cli.panels import in_panels


def test_the_main_job_shows_few_options_without_a_heading() -> None:
    said = CliRunner().invoke(app, ["simulate", "--help"], env={"COLUMNS": "120"}).stdout
    general = said.split("─ Options ─")[1].split("─ Sites ─")[0]
    assert general.count("│ --") == 5
    privacy = said.split("─ Privacy ─")[1].split("╰")[0]
    assert "--person-rate" in privacy
    assert "--rounds" not in privacy


def test_a_heading_over_an_option_that_is_not_there_is_an_error() -> None:
    def command(size: Annotated[int, typer.Option()] = 1) -> None:
        """Do nothing."""

    with pytest.raises(KeyError, match="depth"):
        in_panels({"Shape": ("size", "depth")})(command)
