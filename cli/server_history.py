"""`dafne-federated server history`: every generation and version, and who took part."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.printable import printable
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_runs import all_runs
from dafne_federated.server.generation import is_closed, is_generation, trained_cases, versions


def history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the coordinator.")],
) -> None:
    """Show every federation that goes on: its base, its versions, and which sites trained them.

    Example: dafne-federated server history coordinator
    """
    print("\n".join(map(printable, history_lines(ServerFolder(folder)))) or "none yet")


def history_lines(folder: ServerFolder) -> list[str]:
    """Return what to show of all generations of a coordinator, the oldest first."""
    lines = []
    found = [run for run in all_runs(folder) if is_generation(run)]
    releases = {
        version.result().release_digest: f"version {version.path.name} of {run.path.name}"
        for run in found
        for version in versions(run)
        if is_closed(version) and version.result().released
    }
    for number, run in enumerate(found, start=1):
        info = run.info()
        base = releases.get(info.base_digest, info.base_name)
        lines.append(f"generation {number}: {run.path.name}, base {base} ({info.base_digest[:12]})")
        lines += version_lines(run) or ["  no version yet"]
    return lines


def version_lines(run: RunFolder) -> list[str]:
    """Return one line for each version of a generation."""
    return [f"  {_version_line(version)}" for version in versions(run)]


def _version_line(version: RunFolder) -> str:
    begun = f"{datetime.fromtimestamp(version.info().created):%Y-%m-%d %H:%M}"
    sites = ", ".join(f"{name} {cases}" for name, cases in trained_cases(version).items())
    words = f"{version.path.name}  {begun}  {sites or 'nobody yet'}"
    if not is_closed(version):
        return f"{words}; under way, {len(version.rounds())} rounds"
    result = version.result()
    if result.decision and result.decision.change is not None:
        persons = f"{result.decision.persons} persons who accept"
        words += f"; Dice {result.decision.change:+.3f} in {persons}"
        if (base := result.decision.base) is not None and base.change is not None:
            words += f", {base.change:+.3f} from the base"
    return f"{words}; {f'released {result.release}' if result.released else 'nothing released'}"
