"""The programs of a coordinator: SuperLink, the one that starts runs, and the gateway."""

import shutil
import sys

from dafne_federated.core.errors import RunError
from dafne_federated.core.flower_command import write_connection
from dafne_federated.core.health import serving, speaks_tls
from dafne_federated.core.supervision import Program, supervise, supervisor
from dafne_federated.server.deployment_folder import ServerFolder


def server_programs(folder: ServerFolder) -> list[Program]:
    """Return what runs at a coordinator, as Flower 1.41 wants it started.

    With isolation ``process`` and a database a run outlives the death of the SuperLink, and
    the secret keeps others from taking over the programs of a run.
    """
    settings, environment = folder.settings, folder.environment
    first = settings.local_port
    trust = ("--root-certificates", str(folder.authority))
    secret = ("--superexec-auth-secret-file", str(folder.secret))
    superlink = (
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(first)),
        *("--ssl-certfile", str(folder.certificate), "--ssl-keyfile", str(folder.key)),
        *("--ssl-ca-certfile", str(folder.authority), "--enable-supernode-auth"),
        *("--database", str(folder.database), "--isolation", "process", *secret),
        *("--disable-runtime-dependency-installation",),
        *("--health-server-address", f"127.0.0.1:{first + 1}"),
    )
    executor = (
        *("flower-superexec", "--runtime-api-address", f"127.0.0.1:{first}", *trust, *secret),
        *("--health-server-address", f"127.0.0.1:{first + 2}"),
    )
    gateway = (sys.executable, "-P", "-m", "dafne_federated.server.gateway", str(folder.path))
    return [
        Program("superlink", superlink, environment),
        Program("runs", executor, environment),
        Program("gateway", gateway, environment),
    ]


def start_server(folder: ServerFolder) -> None:
    """Run a coordinator until this process is told to end.

    Raises:
        SettingsError: ``folder`` is not one of a coordinator.
        RunError: It runs already.
    """

    def prepare() -> None:
        # Flower uses what it unpacked earlier without looking at it again.
        shutil.rmtree(folder.home / "apps", ignore_errors=True)
        write_connection(folder.home, folder.settings.local_port, folder.authority)

    supervise(server_programs(folder), folder.logs, folder.lock, prepare)


def server_health(folder: ServerFolder) -> dict[str, bool]:
    """Return by program of a coordinator whether it is up."""
    settings, first = folder.settings, folder.settings.local_port
    return {
        "superlink": serving(first + 1),
        "runs": serving(first + 2),
        "gateway": speaks_tls(settings.listen, settings.port, folder.authority),
    }


def require_running(folder: ServerFolder) -> None:
    """Refuse to ask anything of a coordinator that is not up.

    Raises:
        RunError: It was not started, or one of its programs is down.
    """
    if supervisor(folder.lock) is None:
        start = f"'dafne-federated server start {folder.path}'"
        msg = f"the coordinator is stopped; start it with {start}"
        raise RunError(msg)
    if down := sorted(name for name, up in server_health(folder).items() if not up):
        msg = f"{', '.join(down)} of the coordinator is not up yet; see {folder.logs}"
        raise RunError(msg)
