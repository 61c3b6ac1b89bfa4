"""`dafne-federated new-task`: a model with other labels, to start a federation from."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.output_file import check_output
from dafne_federated.cli.printable import printable
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.model_file import read_model, write_model
from dafne_federated.core.new_task import new_task as start_task


def new_task(
    base: Annotated[Path, typer.Argument(help="The Dafne .model to start from.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .model file.")],
    labels: Annotated[str, typer.Option(help="Label names with commas between, channel 1 first.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the new model; else the base's and 'new task'.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise in new columns of the head.")] = 1,
) -> None:
    """Give a model other labels: its network with a new head, as a model of its own.

    Labels that the base has by the same name keep what it learned; nothing of it is executed.

    Example: dafne-federated new-task Leg.model -o Tendons.model --labels "Soleus,Achilles tendon"
    """
    check_output(output)
    approvals = Approvals()
    model = read_model(base)
    if approved := approvals.allows(model.digest):
        check_output(approvals.path, replace=True)
    names = [label.strip() for label in labels.split(",")]
    made = start_task(model, names, seed, name)
    written = write_model(made, output)
    if approved:
        approvals.add(written, f"made here by new-task from the approved {model.digest[:16]}")
    kept = written.metadata["derived_from"]["kept_labels"]
    print(f"{output}  {written.digest}")
    print(f"name:   {printable(written.metadata['model_name'])} ({written.model_id})")
    for channel, label in enumerate(names, start=1):
        start = "kept from the base" if label in kept else "new, starts from the base's foreground"
        print(f"label:  {channel} {printable(label)} ({start})")
    if not approved:
        print("The base is not approved on this machine, so the new model is not, either:")
        print(f"next:   dafne-federated approve {shlex.quote(str(output))}")
    print(f"next:   dafne-federated simulate DATA --base {shlex.quote(str(output))}")
