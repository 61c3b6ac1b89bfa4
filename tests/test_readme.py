"""The commands in the README are the ones that run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for line in "".join(BLOCKS).splitlines() if line]


def test_ci_calls_exactly_the_test_command() -> None:
    (tests,) = [command for command in COMMANDS if command.endswith("pytest")]
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_two_commands_set_everything_up() -> None:
    assert len([command for command in COMMANDS if "venv" in command]) == 2


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


@pytest.mark.slow
def test_the_example_commands_run_in_order(tmp_path: Path) -> None:
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    commands = [command for command in COMMANDS if command.startswith("dafne-federated")]
    assert len(commands) >= 8
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs/small/report.html").exists()
    assert (tmp_path / "north.csv").read_text().startswith("case,label,dice")
