"""`dafne-federated merge`: fold a run or a state file into its base."""

import time
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.model_file import read_model, write_model
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import load_state
from dafne_federated.server.release import adapted_model


def merge(
    source: Annotated[Path, typer.Argument(help="A run folder, or a state file (.npz) of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .model file.")],
    base: Annotated[
        Path | None, typer.Option(help="The base .model; a run folder has its own.")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", help="Round of a run folder; by default the last.")
    ] = None,
) -> None:
    """Fold adapters into their base and write a .model that Dafne opens.

    Folding needs neither the model's code nor TensorFlow, and there is no gate: a run's own
    release is in its folder.

    Example: dafne-federated merge runs/demo --round 3 -o Thigh_round3.model
    """
    if output.exists():
        msg = f"{output}: there is a file already; choose another name"
        raise SettingsError(msg)
    if source.is_dir():
        folder = RunFolder(source)
        last = folder.rounds()[-1].round if number is None else number
        path = source / "checkpoints" / f"round-{last:04d}.npz"
        base = base or folder.base
    else:
        path = source
    if base is None:
        msg = "expected --base FILE with a state file, got none"
        raise SettingsError(msg)
    plan, state = load_state(path)
    model = read_model(base)
    if model.digest != plan.base_digest:
        msg = (
            f"{base.name}: expected the base with digest {plan.base_digest[:16]}, "
            f"got {model.digest[:16]}"
        )
        raise SettingsError(msg)
    written = write_model(adapted_model(model, plan, state, int(time.time())), output)
    approvals = Approvals()
    if approvals.allows(model.digest):
        approvals.add(written, f"merged here from the approved {model.digest[:16]}")
    print(f"{output}  {written.digest}")
