"""The commands in docs/ are ones that there are, with the options that they have."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from dafne_federated.cli.app import app

DOCS = Path(__file__).parent.parent / "docs"
COMMANDS = [
    line
    for page in sorted(DOCS.glob("*.md"))
    for line in re.findall(
        r"^ +(?:ExecStart=\S*/)?dafne-federated (.+)$",
        page.read_text().replace("\\\n", ""),
        flags=re.MULTILINE,
    )
]


def test_both_pages_show_commands() -> None:
    shown = {command.split()[0] for command in COMMANDS}
    assert {"server", "site"} <= shown
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_can_be_typed_as_it_stands(line: str) -> None:
    command, words = typer.main.get_command(app), shlex.split(line)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    options = [option for parameter in command.params for option in parameter.opts]
    assert {word for word in words if word.startswith("-")} <= set(options)
    command.make_context("dafne-federated", words)  # raises where something is missing
