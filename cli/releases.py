"""`dafne-federated releases`: list what a coordinator released, and go back to an earlier one."""

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dafne_federated.cli.models import MOVED, AsJson, KeyFile, connect, progress
from dafne_federated.cli.printable import printable
from dafne_federated.cli.release_origin import release_origin
from dafne_federated.core.errors import ReleaseError, SettingsError, VersionMovedError
from dafne_federated.core.model_file import read_model
from dafne_federated.server.dafne_server import checked_name, model_versions
from dafne_federated.server.publication import publish
from dafne_federated.server.releases import (
    Release,
    make_current,
    release_of,
    releases,
    run_name,
)

app = typer.Typer(no_args_is_help=True, help="What a coordinator released: list, and go back.")
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the coordinator, or of runs.")
]


@app.command("list")
def list_command(folder: Folder, json_output: AsJson = False) -> None:
    """List all releases, the oldest first, with Dice on validation persons; * is the current one.

    Example: dafne-federated releases list coordinator
    """
    found = releases(folder)
    if json_output:
        print(json.dumps([_facts(release) for release in found], indent=2))
        return
    table = Table("", "model", "run", "date", "Dice base", "Dice release", "SHA-256")
    for own in found:
        dice = ["-" if value is None else f"{value:.3f}" for value in (own.base_dice, own.dice)]
        mark, day = (
            "*" if own.current else "",
            f"{datetime.fromtimestamp(own.created, UTC):%Y-%m-%d}",
        )
        name, run = printable(own.name), printable(run_name(own.run))
        table.add_row(mark, name, run, day, *dice, own.digest[:16])
    Console().print(table)


@app.command("rollback")
def rollback(
    folder: Folder,
    run: Annotated[
        str,
        typer.Argument(
            help="Run, or version such as thigh/0002, whose release shall be the current one."
        ),
    ],
    server: Annotated[
        str | None, typer.Option(help="Dafne server on which it shall be the newest again.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model on the server; by default that of the release.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    key_file: KeyFile = None,
    json_output: AsJson = False,
) -> None:
    """Make an earlier release the current one; with --server, publish it again as the newest.

    Nothing is deleted. The release is verified first. On the server the newest version must be
    one of these releases; else it ends with status 3, and nothing was published.

    Example: dafne-federated releases rollback coordinator first --server https://…/api/
    """
    chosen = release_of(folder, run)
    model = read_model(chosen.file)
    if objection := release_origin(chosen.file, model, chosen.run.path).objection:
        msg = f"{chosen.file.name}: not made the current one: {objection}"
        raise ReleaseError(msg)
    version = None
    if server is not None:
        if not yes and not sys.stdin.isatty():
            msg = "rollback: expected --yes where nobody can be asked"
            raise SettingsError(msg)
        if not yes:
            words = f"publish {chosen.file.name} again, to everybody as the newest version"
            typer.confirm(f"Do you want to {words}?", abort=True)
        try:
            version = _push(folder, chosen, server, name, key_file, json_output)
        except VersionMovedError as error:
            print(f"dafne-federated: {printable(str(error))}", file=sys.stderr)
            raise typer.Exit(MOVED) from None
    make_current(folder, chosen)
    if json_output:
        print(json.dumps(_facts(replace(chosen, current=True)) | {"version": version}, indent=2))
        return
    print(f"current: {printable(chosen.file)}  {chosen.digest}")
    if version is not None:
        print(f"on the server: version {version}")


def _push(
    folder: Path,
    chosen: Release,
    server: str,
    name: str | None,
    key_file: Path | None,
    hidden: bool,
) -> int:
    """Publish a release again, over another release of the same model and nothing else."""
    on_server = checked_name(name or chosen.name)
    own = {release.digest for release in releases(folder) if release.name == chosen.name}
    with connect(server, key_file) as connection:
        there = model_versions(connection, on_server)
        newest = there.digests.get(there.latest, "")
        if newest not in own:
            msg = (
                f"{on_server}: version {there.latest}, the newest, is none of these releases and "
                "would be hidden; nothing was published. Ask who published it"
            )
            raise VersionMovedError(msg, there.holding(chosen.digest), there.latest)
        with progress(f"Uploading {on_server}", hidden) as told:
            return publish(connection, on_server, chosen.file.read_bytes(), newest, told).version


def _facts(release: Release) -> dict[str, Any]:
    return {
        "model": release.name,
        "run": run_name(release.run),
        "file": str(release.file),
        "digest": release.digest,
        "created": release.created,
        "base_dice": release.base_dice,
        "dice": release.dice,
        "current": release.current,
    }
