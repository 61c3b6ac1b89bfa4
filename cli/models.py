"""`dafne-federated models`: list, show, pull and push models of a Dafne server."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from dafne_federated.cli.output_file import check_output
from dafne_federated.cli.printable import json_value, printable
from dafne_federated.cli.release_origin import release_origin
from dafne_federated.core.errors import ModelFileError, SettingsError, VersionMovedError
from dafne_federated.core.files import sha256
from dafne_federated.core.merged_model import release_name
from dafne_federated.core.model_file import ModelFile, parse_model, read_model
from dafne_federated.server.api_key import VARIABLE, find_key
from dafne_federated.server.dafne_connection import DafneConnection, Told, server_address
from dafne_federated.server.dafne_download import copy_model, pull
from dafne_federated.server.dafne_server import (
    ModelVersions,
    checked_name,
    list_models,
    model_versions,
)
from dafne_federated.server.publication import contribute, publish, require_base_newest

MOVED = 3  # exit status: run again from the newest version, then push

app = typer.Typer(no_args_is_help=True, help="Models of a Dafne server: list, show, pull, push.")

Server = Annotated[
    str, typer.Option("--server", envvar="DAFNE_SERVER", help="Address, such as https://…/api/.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help=f"File with your key; else {VARIABLE}, else the keyring."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


@app.command("list")
def list_command(server: Server, key_file: KeyFile = None, json_output: AsJson = False) -> None:
    """List the models that your key has access to, with their newest versions.

    Example: dafne-federated models list --server https://dafne.example.org/api/
    """
    with connect(server, key_file) as connection:
        models = [model_versions(connection, name) for name in list_models(connection)]
    if json_output:
        print(json.dumps([_facts(model) for model in models], indent=2))
        return
    table = Table("model", "newest version", "versions", "MiB", "SHA-256")
    for model in models:
        size = "-" if model.size is None else f"{model.size / 2**20:.1f}"
        digest = model.digests.get(model.latest, "-")[:16]
        table.add_row(model.name, _date(model.latest), str(len(model.versions)), size, digest)
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the model on the server.")],
    server: Server,
    key_file: KeyFile = None,
    json_output: AsJson = False,
) -> None:
    """Show all versions of a model and what the server says about it.

    Example: dafne-federated models show Thigh --server https://dafne.example.org/api/
    """
    with connect(server, key_file) as connection:
        model = model_versions(connection, name)
    if json_output:
        print(json.dumps(_facts(model), indent=2))
        return
    console = Console()
    table = Table("version", "date", "SHA-256", title=Text(name), title_justify="left")
    for version in reversed(model.versions):
        digest = model.digests.get(version, "(not stated)")[:16]
        table.add_row(str(version), _date(version), digest)
    console.print(table)
    if model.unfinished:
        console.print(Text(f"not ended uploads: {printable(', '.join(model.unfinished))}"))
    for key, value in model.metadata.items():
        console.print(Text(f"{printable(key)}: {printable(value)}"))


@app.command("pull")
def pull_command(
    name: Annotated[str, typer.Argument(help="Name of the model on the server.")],
    server: Server,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File; by default NAME_VERSION.model.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="By default the newest.")] = None,
    key_file: KeyFile = None,
    json_output: AsJson = False,
) -> None:
    """Download a version, compare it with the server's digest, and write it.

    A download that broke off goes on where it was, if the server can; what was downloaded once
    is not downloaded again. Nothing of the model runs before you approve it.

    Example: dafne-federated models pull Thigh --server https://dafne.example.org/api/
    """
    with connect(server, key_file) as connection:
        model = model_versions(connection, name)
        chosen = model.latest if version is None else version
        target = output or Path(f"{name}_{chosen}.model")
        check_output(target)
        with progress(f"Downloading {name}", json_output) as told:
            kept = pull(connection, model, version, told=told)
    _require_model(kept, f"{name}: version {chosen}")
    copy_model(kept, target)
    if json_output:
        digest = model.digests[chosen]
        print(json.dumps({"file": str(target), "version": chosen, "digest": digest}, indent=2))
    else:
        print(f"{target}  {model.digests[chosen]}")


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="The release of a run.")],
    server: Server,
    name: Annotated[
        str | None, typer.Option(help="Model on the server; by default that of the metadata.")
    ] = None,
    contribution: Annotated[
        bool, typer.Option("--contribute", help="Send it to be merged, not as the next version.")
    ] = False,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run, if the file was moved out of it.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also a file that is not a release, or failed its check."),
    ] = False,
    after: Annotated[
        int | None, typer.Option(help="With --force: the version it follows, if it does not say.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    key_file: KeyFile = None,
    json_output: AsJson = False,
) -> None:
    """Publish a release as the next version of its model, if its base is still the newest.

    The signature is verified first. Ends with status 3 and the commands to go on with if another
    version was published meanwhile: what was learned on the old base was measured there, and has
    to pass the gate on the new one. A push that was interrupted goes on with the same command.

    Example: dafne-federated models push runs/demo/release/Thigh_1700000000.model --server …
    """
    model = read_model(file)
    name = checked_name(name or _family(model))
    origin = release_origin(file, model, run)
    if origin.objection and not force:
        msg = f"{file.name}: not published: {origin.objection}; --force publishes it nevertheless"
        raise SettingsError(msg)
    if not force and after is not None:
        msg = "after: only with --force; a release says itself which version it follows"
        raise SettingsError(msg)
    if not yes and not sys.stdin.isatty():
        msg = "push: expected --yes where nobody can be asked"
        raise SettingsError(msg)
    data = file.read_bytes()
    if sha256(data) != model.digest:
        msg = f"{file.name}: changed while it was looked at; nothing was sent"
        raise SettingsError(msg)
    try:
        with connect(server, key_file) as connection:
            there = model_versions(connection, name)
            base = there.digests.get(after) if after is not None else origin.base_digest
            if base is None:
                msg = (
                    f"{file.name}: expected --after VERSION: which version on the server it follows"
                )
                raise SettingsError(msg)
            newest = there.digests.get(there.latest)
            if after is None and newest in origin.earlier:
                base = newest  # a version follows the base of its generation, or one before it
            if newest != model.digest:
                require_base_newest(there, base)
            if not yes:
                _ask(there, model, contribution, len(data), origin.objection, connection.address)
            with progress(f"Uploading {name}", json_output) as told:
                if contribution:
                    dice = -1.0 if origin.dice is None else origin.dice
                    contribute(connection, name, data, base, dice, told)
                    facts: dict[str, Any] = {"model": name, "contribution": model.digest}
                else:
                    done = publish(connection, name, data, base, told)
                    facts = {
                        "model": name,
                        "version": done.version,
                        "digest": done.digest,
                        "beside": done.beside,
                    }
    except VersionMovedError as error:
        print(f"dafne-federated: {printable(str(error))}", file=sys.stderr)
        for line in _by_hand(name, error.latest, server):
            print(f"  {printable(line)}", file=sys.stderr)
        raise typer.Exit(MOVED) from None
    if json_output:
        print(json.dumps(facts, indent=2))
    elif contribution:
        print(f"{name}: sent as a contribution, {model.digest}")
    else:
        print(f"{name}: version {done.version} is on the server, {done.digest}")
        if done.beside:
            others = ", ".join(map(str, done.beside))
            print(f"Published by somebody else at the same time, and not part of it: {others}")


def connect(server: str, key_file: Path | None) -> DafneConnection:
    """Return a connection to a Dafne server, with the key that is found."""
    address = server_address(server)
    return DafneConnection(address, find_key(address, key_file))


def _by_hand(name: str, latest: int, server: str) -> list[str]:
    """Return the commands that adapt the newest version instead."""
    file = f"{name}_{latest}.model".replace(" ", "-")
    return [
        f"dafne-federated models pull {shlex.quote(name)} --version {latest} -o {file} "
        f"--server {server}",
        f"dafne-federated approve {file}",
        f"dafne-federated server run DIR --base {file}",
        f"dafne-federated models push DIR/runs/RUN/release/NAME.model --server {server}",
    ]


def _require_model(path: Path, named: str) -> None:
    try:
        parse_model(path.read_bytes())
    except ModelFileError as error:  # servers take any file
        msg = f"{named} on the server is no model that can be read here: {error}"
        raise ModelFileError(msg) from None


def _ask(
    there: ModelVersions,
    model: ModelFile,
    contribution: bool,
    size: int,
    objection: str,
    address: str,
) -> None:
    print(f"server:   {address}")
    print(f"model:    {there.name}")
    print(f"newest:   {there.latest} ({_date(there.latest)})")
    print(f"file:     {size / 2**20:.1f} MiB, digest {model.digest}")
    if objection:
        print(f"warning:  {printable(objection)}")
    end = "send it to be merged" if contribution else "publish it to everybody as the next version"
    typer.confirm(f"Do you want to {end}?", abort=True)


def _family(model: ModelFile) -> str:
    name, _, _ = release_name(model, 0).partition("_")
    return name


def _facts(model: ModelVersions) -> dict[str, Any]:
    return {
        "name": model.name,
        "latest": model.latest,
        "size": model.size,
        "versions": [
            {"version": version, "digest": model.digests.get(version)} for version in model.versions
        ],
        "unfinished": model.unfinished,
        "server": model.kind,
        "metadata": json_value(model.metadata),
    }


def _date(version: int) -> str:
    return f"{datetime.fromtimestamp(version, UTC):%Y-%m-%d %H:%M} UTC"


@contextlib.contextmanager
def progress(title: str, hidden: bool) -> Iterator[Told]:
    """Give a function that shows bytes done and their total."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    disable = hidden or not console.is_interactive
    with Progress(*columns, console=console, disable=disable, transient=True) as progress:
        task = progress.add_task(printable(title), total=None)

        def told(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield told
