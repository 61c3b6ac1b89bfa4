"""Flower's own command line, asked for JSON, in an environment that calls nobody."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dafne_federated.core.errors import FlowerError

CONNECTION = "own"  # the one SuperLink that our configuration of Flower knows
_TIMEOUT = 120.0  # seconds for one command
# A message waits for its program, and a run for its own, half of this on average; Flower's own
# choice is 1 s. Whoever sets it in the environment is heard.
_PATIENT = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25"}
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def quiet_environment(home: Path) -> dict[str, str]:
    """Return this process's environment for Flower: no telemetry, no installs, no proxy at home.

    Flower starts its programs by name, so the folder of this Python comes first in ``PATH``.

    Args:
        home: Flower's own folder.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    direct = {}
    for name in ("NO_PROXY", "no_proxy"):
        others = [host for host in os.environ.get(name, "").split(",") if host]
        direct[name] = ",".join(["127.0.0.1", "localhost", *others])
    return {**_PATIENT, **os.environ, **_QUIET, **direct, "FLWR_HOME": str(home), "PATH": path}


def write_connection(home: Path, port: int, authority: Path | None = None) -> None:
    """Tell Flower's command line of the one SuperLink here.

    Args:
        home: Flower's own folder.
        port: Where it listens on this machine.
        authority: Certificate that its own is checked with; None where it speaks without TLS.
    """
    trust = "insecure = true"
    if authority is not None:
        trust = f"root-certificates = {json.dumps(str(authority.resolve()))}"
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    (home / "config.toml").write_text(
        f'{text}address = "127.0.0.1:{port}"\n{trust}\n', encoding="utf-8"
    )


def flwr(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Run ``flwr`` and return its JSON answer.

    Args:
        arguments: What to do.
        environment: See ``quiet_environment``.
        folder: Where it runs; nothing in it may be a Python module.

    Raises:
        FlowerError: It failed; with what it said, or after two minutes without an answer.
    """
    try:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        msg = f"'flwr {arguments[0]}' gave no answer within {_TIMEOUT:g} s"
        raise FlowerError(msg) from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode != 0 or not answer.get("success", False):
        said = answer.get("error-message") or done.stdout + done.stderr
        msg = f"'flwr {arguments[0]}' failed: {str(said).strip()[-500:]}"
        raise FlowerError(msg)
    return answer


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Return whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
