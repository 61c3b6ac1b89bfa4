"""`dafne-federated server`: the coordinator of a federation between hospitals."""

from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.core.supervision import stop as stop_supervisor
from dafne_federated.core.supervision import supervisor
from dafne_federated.server.certificates import days_left
from dafne_federated.server.deployment_folder import ServerFolder, ServerSettings, make_server
from dafne_federated.server.deployment_processes import start_server

app = typer.Typer(help="The coordinator of a federation between hospitals.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the coordinator.")]


@app.command("init")
def init(
    folder: Folder,
    host: Annotated[
        list[str], typer.Option(help="Name or address under which sites reach it; repeatable.")
    ],
    port: Annotated[int, typer.Option(help="The one port for sites.")] = 9443,
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    local_port: Annotated[int, typer.Option(help="First of three ports of this machine.")] = 9500,
) -> None:
    """Make the folder of a coordinator: keys, certificates, settings; nothing is replaced.

    Example: dafne-federated server init coordinator --host federation.example.org
    """
    chosen = ServerSettings(hosts=tuple(host), port=port, listen=listen, local_port=local_port)
    made = make_server(folder, chosen)
    print(f"settings:     {made.settings_file}")
    print(f"for sites:    {made.authority}  (give it to each site on a way that they trust)")
    print(f"certificate:  valid for {days_left(made.certificate)} days")


@app.command("start")
def start(folder: Folder) -> None:
    """Run the coordinator until it is stopped; programs that end are started again.

    Example: dafne-federated server start coordinator
    """
    opened = ServerFolder(folder)
    settings = opened.settings
    print(f"sites reach it at {', '.join(f'{host}:{settings.port}' for host in settings.hosts)}")
    print(f"logs: {opened.logs}", flush=True)
    start_server(opened)


@app.command("stop")
def stop(folder: Folder) -> None:
    """Stop the coordinator; a run that is under way can be resumed later.

    Example: dafne-federated server stop coordinator
    """
    opened = ServerFolder(folder)
    running = supervisor(opened.lock)
    stopped = stop_supervisor(opened.lock)
    print(f"stopped (process {running})" if stopped else "it was not running")
