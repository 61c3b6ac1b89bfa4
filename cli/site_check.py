"""`dafne-federated site check`: what would keep a site from taking part, and whom to tell."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dafne_federated.cli.printable import printable
from dafne_federated.client.deployment_folder import SiteFolder
from dafne_federated.client.doctor import check_site


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the site.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Check the way to the coordinator, this machine, the data, and a step of training.

    Example: dafne-federated site check site

    Ends with status 1 if anything fails, and 0 otherwise.
    """
    found = []
    with Console(stderr=True).status("checking ..."):
        for one in check_site(SiteFolder(folder)):
            found.append(one)
            if not json_output:
                print(f"{one.status:<5} {one.name}: {printable(one.found)}", flush=True)
                if one.advice:
                    print(f"      -> {printable(one.advice)}", flush=True)
    if json_output:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    if any(one.status == "fail" for one in found):
        raise typer.Exit(1)
