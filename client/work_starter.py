"""Flower's `flower-superexec`, which starts nothing but the guard.

Flower's own starts programs by name, so that what runs depends on the path, and on what lies
there at that moment. Here the one command is the guard within the installed package, by the
Python that runs this. Where it is gone, nothing runs, and the site's people are told why.

It replaces one name in a module of Flower 1.41 that is not public; a test watches over it.
"""

import subprocess
import sys
from pathlib import Path

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor

from dafne_federated.client import guard
from dafne_federated.client.flower_parts import replace_parts
from dafne_federated.client.refusals import note_refusal
from dafne_federated.core.errors import RunError

GUARD = Path(guard.__file__)


def require_guard() -> None:
    """Refuse to go on without the guard.

    Raises:
        RunError: It is not where this package was installed.
    """
    if not GUARD.is_file():
        msg = f"nothing is run: {GUARD} is missing; install this package again, start the site"
        raise RunError(msg)


class GuardedStart(SubprocessExecutor):
    """Starts the guard for each message, and no other program for anything."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the guard, or note why not."""
        try:
            if spec.task_type != TaskType.CLIENT_APP:
                msg = f"nothing is run: a site has no work of the kind {spec.task_type.value!r}"
                raise RunError(msg)
            require_guard()
            self._running.append(subprocess.Popen(_command(spec)))
        except (RunError, OSError) as error:
            note_refusal(str(error))
            return LaunchResult.failed(str(error))
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Note what ended by itself; Flower calls this again and again."""
        for process in self._running:
            if process.poll():
                note_refusal(f"a program ended with status {process.returncode}; see logs/work.log")
        self._running = [process for process in self._running if process.returncode is None]


def main() -> None:
    """Do what Flower's own program does, but start nothing other than the guard."""
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec import run_superexec

    replace_parts(run_superexec, "guard", get_executor=lambda *_given, **_named: GuardedStart())
    flower_superexec()


def _command(spec: ExecutionSpec) -> list[str]:
    return [
        *(sys.executable, "-P", "-m", guard.__name__),
        *("--runtime-api-address", spec.runtime_api_address, "--insecure"),
        *("--token", spec.token),
        *(("--parent-pid", str(spec.parent_pid)) if spec.parent_pid is not None else ()),
    ]


if __name__ == "__main__":
    main()
