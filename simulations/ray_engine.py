"""Run a federation on Flower's simulation runtime: Ray workers, many cores, GPUs, a cluster.

We start our own SuperLink from an empty folder, because Flower's workers put the folder that
the SuperLink was started in first on their import path; we watch the run, and everything that
was started for it ends with it.
"""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import RunError
from dafne_federated.core.flower_bundle import RUNS, write_app
from dafne_federated.core.flower_command import (
    CONNECTION,
    answers,
    flwr,
    free_port,
    quiet_environment,
    write_connection,
)
from dafne_federated.core.leftover_processes import MARK, ended_afterwards

_START = 90.0  # seconds to wait for the SuperLink
_POLL = 1.0  # seconds between two looks at a run


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
        port = free_port()
        write_app(app, run)
        write_connection(home, port)
        environment = {**quiet_environment(home), MARK: scratch, RUNS: str(run.resolve().parent)}
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
            command = ["run", str(app), CONNECTION, "--federation-config", federation]
            started = flwr(command, environment, empty)
            _watch(str(started["run-id"]), environment, empty, log)


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
    with superlink as process, ended_afterwards(str(scratch), process.pid, scratch):
        end = time.monotonic() + _START
        while not answers(port):
            if process.poll() is not None or time.monotonic() > end:
                msg = f"Flower's SuperLink did not start; see {output.name}"
                raise RunError(msg)
            time.sleep(0.2)
        yield


def _watch(run_id: str, environment: dict[str, str], folder: Path, log: Path) -> None:
    while True:
        listed = flwr(["ls", CONNECTION, "--run-id", run_id], environment, folder)
        (entry,) = listed["runs"]
        status = str(entry["status"])
        if status.startswith("finished"):
            break
        time.sleep(_POLL)
    if status != "finished:completed":
        msg = f"the run ended as {status}: {entry.get('status-details') or 'no reason given'}"
        raise RunError(f"{msg}; see {log}")
