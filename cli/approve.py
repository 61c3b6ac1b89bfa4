"""`dafne-federated approve`: allow a model to be executed on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.printable import printable
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.model_file import model_labels, read_model


def approve(
    file: Annotated[Path, typer.Argument(help="A Dafne .model file.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    why: Annotated[str, typer.Option(help="Kept with the approval, for later readers.")] = "",
) -> None:
    """Allow a model to run on this machine; its program text then runs with your rights.

    Example: dafne-federated approve Thigh_1610001000.model --why "from dafne.network"
    """
    model = read_model(file)
    approvals = Approvals()
    known = {entry["sources"] for entry in approvals.entries().values()}
    labels = model_labels(model) or {}
    info = model.metadata.get("info")
    author = info.get("Author", "(not said)") if isinstance(info, dict) else "(not said)"
    print(f"name:     {printable(model.metadata.get('model_name', '(none)'))}")
    print(f"author:   {printable(author)}")
    print(f"labels:   {printable(', '.join(labels.values())) or '(not said)'}")
    print(f"digest:   {model.digest}")
    same = model.sources_digest in known
    print(f"program:  {'the same as in a model approved before' if same else 'new here'}")
    if approvals.allows(model.digest):
        print("This model is approved already.")
        return
    if not yes:
        typer.confirm("Its program text will run with your rights. Approve it?", abort=True)
    approvals.add(model, why or "approved on the command line")
    print("Approved.")
