"""`dafne-federated server`: the coordinator of a federation between hospitals."""

from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.server_history import history
from dafne_federated.cli.server_run import resume, run
from dafne_federated.cli.server_status import status
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.signed_release import public_fingerprint
from dafne_federated.core.site_request import SiteRequest
from dafne_federated.core.supervision import stop as stop_supervisor
from dafne_federated.core.supervision import supervisor
from dafne_federated.server.certificates import days_left
from dafne_federated.server.deployment_folder import ServerFolder, ServerSettings, make_server
from dafne_federated.server.deployment_processes import require_running, start_server
from dafne_federated.server.deployment_runs import stop_run
from dafne_federated.server.registration import register as register_site
from dafne_federated.server.registration import registered_sites, site_states
from dafne_federated.server.registration import revoke as revoke_site

app = typer.Typer(help="The coordinator of a federation between hospitals.", no_args_is_help=True)
app.command("run")(run)
app.command("resume")(resume)
app.command("status")(status)
app.command("history")(history)
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
    known_by = public_fingerprint(made.release_public)
    print(f"for users:    {made.release_public}  (to verify releases: {known_by})")
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
def stop(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="[RUN]", help="Only this run.")] = "",
) -> None:
    """Stop a run, or without one the coordinator; a run that is stopped can be resumed.

    Example: dafne-federated server stop coordinator first
    """
    opened = ServerFolder(folder)
    if name:
        require_running(opened)
        stop_run(opened, RunFolder(opened.run_path(name)))
        print(f"stopped; resume it with: dafne-federated server resume {folder} {name}")
        return
    running = supervisor(opened.lock)
    stopped = stop_supervisor(opened.lock)
    print(f"stopped (process {running})" if stopped else "it was not running")


@app.command("register")
def register(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Name of the site, as agreed.")],
    request: Annotated[Path, typer.Argument(help="The request file that the site sent.")],
) -> None:
    """Let a site take part; compare the fingerprint with its people first.

    Example: dafne-federated server register coordinator clinic clinic.request.json
    """
    opened = ServerFolder(folder)
    _ = opened.settings  # say what is wrong with the folder, if something is
    site = register_site(opened, name, SiteRequest.read(request))
    print(f"registered {site.name!r}, fingerprint {site.fingerprint}")


@app.command("revoke")
def revoke(
    folder: Folder, name: Annotated[str, typer.Argument(help="Name of a registered site.")]
) -> None:
    """Let a site take part no more; to come back it needs a new key.

    Example: dafne-federated server revoke coordinator clinic
    """
    opened = ServerFolder(folder)
    _ = opened.settings
    site = revoke_site(opened, name)
    print(f"revoked {site.name!r}, fingerprint {site.fingerprint}")


@app.command("sites")
def sites(folder: Folder) -> None:
    """Show the registered sites, their fingerprints, and who is online.

    Example: dafne-federated server sites coordinator
    """
    opened = ServerFolder(folder)
    _ = opened.settings  # say what is wrong with the folder, if something is
    states = site_states(opened) if supervisor(opened.lock) else {}
    for site in registered_sites(opened):
        state = "revoked" if site.revoked else states.get(site.name, "coordinator is stopped")
        print(f"{site.name:<20} {state:<12} {site.registered}  {site.fingerprint}")
