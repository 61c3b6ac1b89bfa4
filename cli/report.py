"""`dafne-federated report`: write the report of a run again."""

from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.core.run_folder import RunFolder


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
) -> None:
    """Write report.html of a run again from what lies in its folder, and print its path.

    The page needs no network and no script: it can be printed, mailed and archived.

    Example: dafne-federated report runs/demo
    """
    from dafne_federated.simulations.report import write_report

    print(write_report(RunFolder(run)))
