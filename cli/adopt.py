"""`dafne-federated adopt`: a model that a Dafne user retrained, as a state of a plan."""

import json
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dafne_federated.cli.output_file import check_output
from dafne_federated.core.adopted_state import adopt as adopted_state
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.model_file import read_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import load_state, save_state


def adopt(
    base: Annotated[Path, typer.Argument(help="The .model that was retrained.")],
    upload: Annotated[Path, typer.Argument(help="What became of it, as a whole .model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new state file (.npz).")],
    plan: Annotated[
        Path, typer.Option(help="Whose plan: a run folder, or a state file of the same base.")
    ],
    rank: Annotated[
        int | None, typer.Option(help="Of the pairs, 16 if in doubt; by default the plan's.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Turn a retrained model into adapters, and say how much of the change they keep.

    The state can be merged like one that a site trained. Nothing of the models is executed.

    Example: dafne-federated adopt Thigh_1.model theirs.model -o theirs.npz --plan runs/demo
    """
    check_output(output)
    chosen = _plan(plan)
    result = adopted_state(read_model(base), read_model(upload), chosen, rank)
    save_state(output, chosen, result.state)
    if json_output:
        facts = {
            "share": result.share,
            "whole": result.whole,
            "shares": result.shares,
            "left_out": result.left_out,
        }
        print(json.dumps(facts, indent=2))
        return
    table = Table("weight", "kind", "share of its change")
    for target in chosen.targets:
        table.add_row(target.key, target.kind, f"{100 * result.shares[target.key]:.2f}%")
    Console().print(table)
    kept = f"{100 * result.share:.2f}% of the change of what the plan trains is kept"
    print(f"{output}: {kept}, {100 * result.whole:.2f}% of the change of all weights")
    if result.left_out:
        print(f"changed there, but not part of the plan: {', '.join(result.left_out)}")


def _plan(path: Path) -> AdaptationPlan:
    if path.is_dir():
        return RunFolder(path).plan()
    if path.exists() and zipfile.is_zipfile(path):
        return load_state(path)[0]
    msg = f"plan: expected a run folder or a state file (.npz), got {str(path)!r}"
    raise SettingsError(msg)
