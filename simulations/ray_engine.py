"""Run a federation on Flower's simulation runtime: Ray workers, many cores, GPUs, a cluster.

We start our own SuperLink from an empty folder, because Flower's workers put the folder that
the SuperLink was started in first on their import path; we watch the run, and everything that
was started for it ends with it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import RunError
from dafne_federated.core.versions import software_version
from dafne_federated.simulations.leftover_processes import MARK, ended_afterwards

_START = 90.0  # seconds to wait for the SuperLink
_POLL = 1.0  # seconds between two looks at a run
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "NO_PROXY": "127.0.0.1,localhost",
}


def run_ray(run: Path, sites: int, threads: int, parallel: int, gpus_per_site: float = 0.0) -> None:
    """Run the federation in the folder ``run`` with one node per site file.

    Args:
        run: Folder of the run; an absolute path is made of it.
        sites: Number of sites.
        threads: CPU threads of one site; Ray counts them as its CPUs.
        parallel: Sites that work at the same time.
        gpus_per_site: Share of a GPU that one site takes.

    Raises:
        RunError: The runtime did not start, or the run ended other than completed.
    """
    log = run / "flower.log"
    with tempfile.TemporaryDirectory(prefix="dafne-federated-ray-") as scratch:
        home, empty, app = (Path(scratch) / name for name in ("home", "empty", "app"))
        for folder in (home, empty, app):
            folder.mkdir()
        port = _free_port()
        _write_app(app, run)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\n'
            "insecure = true\n",
            encoding="utf-8",
        )
        here = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            **_QUIET,
            "FLWR_HOME": str(home),
            MARK: scratch,
            "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        with log.open("ab") as output, _superlink(port, Path(scratch), environment, output):
            federation = " ".join(
                [
                    f"num-supernodes={sites}",
                    f"client-resources-num-cpus={threads}",
                    f"client-resources-num-gpus={gpus_per_site}",
                    f"init-args-num-cpus={threads * parallel}",
                    "init-args-log-to-driver=false",
                ]
            )
            started = _flwr(
                ["run", str(app), "own", "--federation-config", federation], environment, empty
            )
            _watch(str(started["run-id"]), environment, empty, log)


def _write_app(folder: Path, run: Path) -> None:
    """Write a Flower app that holds no code, only the names of what is installed here."""
    name = f"dafne-run-{software_version().replace('.', '-')}"
    (folder / "pyproject.toml").write_text(
        f'''[project]
name = "{name}"
version = "0.1.0"
description = "A federation of dafne-federated; the code is the installed package"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "dafne"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "dafne_federated.server.app:app"
clientapp = "dafne_federated.client.app:app"

[tool.flwr.app.config]
run = {json.dumps(str(run.resolve()))}
''',
        encoding="utf-8",
    )
    (folder / "README.md").write_text("Configuration of one federation.\n", encoding="utf-8")


@contextlib.contextmanager
def _superlink(
    port: int, scratch: Path, environment: dict[str, str], output: Any
) -> Iterator[None]:
    command = [
        "flower-superlink",
        *("--insecure", "--simulation", "--isolation", "subprocess"),
        *("--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]
    superlink = subprocess.Popen(
        command,
        cwd=scratch / "empty",
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    with superlink as process, ended_afterwards(scratch, process.pid):
        end = time.monotonic() + _START
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > end:
                msg = f"Flower's SuperLink did not start; see {output.name}"
                raise RunError(msg)
            time.sleep(0.2)
        yield


def _watch(run_id: str, environment: dict[str, str], folder: Path, log: Path) -> None:
    while True:
        listed = _flwr(["ls", "own", "--run-id", run_id], environment, folder)
        (entry,) = listed["runs"]
        status = str(entry["status"])
        if status.startswith("finished"):
            break
        time.sleep(_POLL)
    if status != "finished:completed":
        msg = f"the run ended as {status}: {entry.get('status-details') or 'no reason given'}"
        raise RunError(f"{msg}; see {log}")


def _flwr(arguments: list[str], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["flwr", *arguments, "--format", "json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode != 0 or not answer.get("success", False):
        said = answer.get("error-message") or done.stdout + done.stderr
        msg = f"'flwr {arguments[0]}' failed: {str(said).strip()[-500:]}"
        raise RunError(msg)
    return answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
