"""The Flower ServerApp: run the federation whose folder the run configuration names."""

import contextlib

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.flower_bundle import run_folder_path
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.continuous import run_generation
from dafne_federated.server.deployment_folder import signing_key
from dafne_federated.server.generation import is_generation
from dafne_federated.server.release import release
from dafne_federated.server.rounds import run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds that are left, then release what is better than the base.

    A generation goes on until it is stopped.
    """
    folder = RunFolder(run_folder_path(context.run_config))
    with folder.lock():
        folder.event("started")
        try:
            if is_generation(folder):
                run_generation(grid, folder, key=signing_key(folder))
            else:
                run_rounds(grid, folder)
                release(folder, signing_key(folder))
        except DafneFederatedError as error:
            folder.event("stopped", reason=str(error))
            raise
        except Exception as error:
            # A full disk or a lost connection: whoever follows the run starts it again.
            with contextlib.suppress(OSError):
                folder.event("failed", reason=f"{type(error).__name__}: {error}"[:500])
            raise
        folder.event("finished")
