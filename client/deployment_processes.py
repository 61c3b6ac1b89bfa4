"""The programs of a site: Flower's SuperNode, and the one that starts the work it is given."""

import sys

from dafne_federated.client import node, work_starter
from dafne_federated.client.deployment_folder import SiteFolder
from dafne_federated.client.refusals import REFUSALS
from dafne_federated.core.flower_command import quiet_environment
from dafne_federated.core.health import serving
from dafne_federated.core.supervision import Program, supervise


def site_programs(folder: SiteFolder) -> list[Program]:
    """Return what runs at a site, as Flower 1.41 wants it started."""
    connection = folder.connection
    first = connection.local_port
    environment = {
        **quiet_environment(folder.home),
        REFUSALS: str(folder.refusals),
    }
    secret = ("--superexec-auth-secret-file", str(folder.secret))
    supernode = (
        *(sys.executable, "-P", "-m", node.__name__, "--superlink", connection.coordinator),
        *("--root-certificates", str(folder.coordinator)),
        *("--auth-supernode-private-key", str(folder.key), "--isolation", "process", *secret),
        *("--node-config", f'site="{folder.settings_file}"'),
        *("--host", "127.0.0.1", "--port", str(first)),
        *("--health-server-address", f"127.0.0.1:{first + 1}"),
    )
    executor = (
        *(sys.executable, "-P", "-m", work_starter.__name__),
        *("--insecure", "--runtime-api-address", f"127.0.0.1:{first}"),
        *secret,
        *("--health-server-address", f"127.0.0.1:{first + 2}"),
    )
    return [Program("node", supernode, environment), Program("work", executor, environment)]


def start_site(folder: SiteFolder) -> None:
    """Run a site until this process is told to end.

    Raises:
        SettingsError: ``folder`` is not one of a site, or a setting is wrong.
        RunError: It runs already, or the guard is missing.
    """
    programs = site_programs(folder)
    _ = folder.settings  # say now what is wrong with them, not at the first message
    work_starter.require_guard()
    supervise(programs, folder.logs, folder.lock)


def site_health(folder: SiteFolder) -> dict[str, bool]:
    """Return by program of a site whether it is up."""
    first = folder.connection.local_port
    return {"node": serving(first + 1), "work": serving(first + 2)}
