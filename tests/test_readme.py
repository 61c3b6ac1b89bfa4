"""The commands in the README and in `docs/` run, and the pages say what the code says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dafne_federated.cli.app import app
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.strategy_table import ROBUST_TABLE, STRATEGY_TABLE

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
STRATEGIES_PAGE = PAGES["strategies.md"]


def _commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    return [line for line in "".join(blocks).splitlines() if line]


COMMANDS = _commands(PAGES["README.md"])


def test_ci_calls_exactly_the_test_command() -> None:
    (tests,) = [command for command in COMMANDS if command.endswith("pytest")]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_two_commands_set_everything_up() -> None:
    assert len([command for command in COMMANDS if "venv" in command]) == 2


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


def test_every_file_that_a_page_links_to_is_there() -> None:
    for path in [ROOT / "README.md", ROOT / "PRIVACY.md", *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), (path, link)


def test_the_table_of_the_strategies_page_is_that_of_the_code() -> None:
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in STRATEGIES_PAGE.splitlines()
    ]
    words = {True: "yes", False: "no"}
    for name, rules in STRATEGY_TABLE.items():
        cells = (rules.ranks, rules.proximal, rules.sums, rules.late, rules.common)
        shown = (f"`{name}`", rules.pairs, *(words[cell] for cell in cells), rules.noisy)
        assert shown in rows
    named = {row[0].strip("`") for row in rows}
    assert named >= set(ROBUST_TABLE) - {"none"}


def test_the_flags_and_settings_of_the_strategies_page_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        option
        for name in ("simulate", "check-data", "merge")
        for parameter in commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    flags = set(re.findall(r"--[a-z][a-z-]+", STRATEGIES_PAGE))
    assert flags <= known
    (block,) = re.findall(r"```json\n(.*?)```", STRATEGIES_PAGE, flags=re.DOTALL)
    rest = {"name": "a", "data": ".", "training": [], "validation": [], "cache": "."}
    SiteSettings.model_validate({**rest, "approvals": ".", **json.loads(block)})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "strategies.md"])
def test_the_example_commands_run_in_order(page: str, tmp_path: Path) -> None:
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    commands = [line for line in _commands(PAGES[page]) if line.startswith("dafne-federated")]
    assert len(commands) >= {"README.md": 8}.get(page, 1)
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert list(tmp_path.glob("runs/*/report.html"))
    if page == "README.md":
        assert (tmp_path / "north.csv").read_text().startswith("case,label,dice")
