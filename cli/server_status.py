"""`dafne-federated server status`: programs, sites and the run of a coordinator."""

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.printable import printable
from dafne_federated.cli.server_history import version_lines
from dafne_federated.cli.server_run import event_line, round_line
from dafne_federated.core.errors import RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.supervision import supervisor
from dafne_federated.server.certificates import days_left
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_processes import server_health
from dafne_federated.server.deployment_runs import all_runs, is_finished
from dafne_federated.server.generation import is_generation
from dafne_federated.server.registration import registered_sites, site_states

_PAUSE = 5.0  # seconds between two looks
_SOON = 60  # days before the end of a certificate at which it is mentioned
_SHOWN = 8  # events of a run


def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the coordinator.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 5 seconds.")] = False,
) -> None:
    """Show whether the coordinator is up, which sites are online, and how the last run goes.

    The exit status is 0 if all programs are up, else 1.

    Example: dafne-federated server status coordinator
    """
    opened = ServerFolder(folder)
    try:
        while True:
            lines, up = status_lines(opened)
            if watch:
                typer.clear()  # only of a terminal
                lines = [f"{datetime.now():%H:%M:%S}, again every {_PAUSE:g} s", *lines]
            print("\n".join(printable(line) for line in lines), flush=True)
            if not watch:
                raise typer.Exit(0 if up else 1)
            time.sleep(_PAUSE)
    except KeyboardInterrupt:
        return


def status_lines(folder: ServerFolder) -> tuple[list[str], bool]:
    """Return what to show, and whether all programs are up."""
    settings, running = folder.settings, supervisor(folder.lock)
    health = server_health(folder) if running else {}
    up = bool(health) and all(health.values())
    lines = [f"coordinator: {f'running (process {running})' if running else 'stopped'}"]
    lines += [f"  {name:<10} {'up' if good else 'down'}" for name, good in health.items()]
    lines.append(f"  address    {', '.join(f'{host}:{settings.port}' for host in settings.hosts)}")
    if (days := days_left(folder.certificate)) < _SOON:
        lines.append(f"  its certificate ends in {days} days; see docs/coordinator.md")
    return [*lines, *_site_lines(folder, up), *_run_lines(folder)], up


def _site_lines(folder: ServerFolder, up: bool) -> list[str]:
    try:
        states = site_states(folder) if up else {}
    except RunError as error:
        return [f"sites: {error}"]
    names = [site.name for site in registered_sites(folder) if not site.revoked]
    lines = [f"sites: {sum(s == 'online' for s in states.values())} of {len(names)} online"]
    return lines + [f"  {name:<20} {states.get(name, 'unknown')}" for name in names]


def _run_lines(folder: ServerFolder) -> list[str]:
    runs = all_runs(folder)
    if not runs:
        return ["run: none yet"]
    run = next((run for run in runs if run.is_locked()), runs[-1])
    settings, rounds, events = run.info().settings, run.rounds(), list(run.events())
    if is_generation(run):
        lines = [
            f"run: {run.path.name}, {'under way' if run.is_locked() else 'stopped; resume it'}"
        ]
        return [*lines, *version_lines(run)[-_SHOWN:]]
    lines = [f"run: {run.path.name}, {_state(run)}; needs {settings.min_sites} sites a round"]
    lines.append(f"  rounds     {min(len(rounds), settings.rounds)} of {settings.rounds}")
    if rounds:
        lines.append(f"  last       {round_line(rounds[-1])}")
    under_way = len(rounds) + 1
    answered = [
        str(event["site"])
        for event in events
        if event["event"] == "site answered" and event["round"] == under_way
    ]
    if run.is_locked() and answered:
        lines.append(f"  round {under_way}: answers of {', '.join(sorted(set(answered)))}")
    told = [
        f"  {datetime.fromtimestamp(event['time']):%H:%M:%S}   {words}"
        for event in events
        if event["event"] in ("members", "not used", "lost", "stopped")
        and (words := event_line(run, event) or str(event.get("reason", "")))
    ]
    return lines + told[-_SHOWN:]


def _state(run: RunFolder) -> str:
    if run.is_locked():
        return "under way"
    if is_finished(run):
        return "finished, released" if run.result().released else "finished, nothing released"
    return "not finished; resume it"
