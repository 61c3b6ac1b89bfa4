"""`dafne-federated evaluate`: a model against masks that people drew."""

import csv
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from dafne_federated.cli.output_file import check_output
from dafne_federated.cli.printable import printable
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.dataset import CaseRef, DataFolder, load_case, open_folder
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.metrics import Agreement, mean
from dafne_federated.core.model_file import read_model
from dafne_federated.core.settings import read_settings

FIELDS = ("dice", "hd95", "volume_error")


def evaluate(
    model: Annotated[Path, typer.Argument(help="A Dafne .model, approved on this machine.")],
    data: Annotated[Path, typer.Argument(help="Folder of NIfTI pairs or Dafne bundles.")],
    classification: Annotated[
        str, typer.Option(help="Class as Dafne names it, e.g. 'Thigh, Left'.")
    ] = "",
    site: Annotated[str | None, typer.Option(help="Only the cases of this site.")] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write one line per case and label.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
) -> None:
    """Measure Dice, HD95 (mm) and volume error (%) per label and case.

    Example: dafne-federated evaluate Thigh_1700000000.model data/thigh --csv thigh.csv
    """
    settings = read_settings(None, threads=threads, device=device)
    if csv_file:
        check_output(csv_file, replace=True)
    folder = open_folder(data)
    refs = cases_of_site(folder, site)
    file = read_model(model)
    Approvals().require(file)
    prepare_backend(settings.threads, settings.device)
    from dafne_federated.core.evaluation import evaluate_case
    from dafne_federated.core.model_runtime import RunningModel

    running = RunningModel(file, Approvals())
    rows: list[Agreement] = []
    console = Console(stderr=True)
    hidden = json_output or not console.is_interactive
    with Progress(console=console, disable=hidden, transient=True) as progress:
        for ref in progress.track(refs, description="Evaluating"):
            case = load_case(ref, folder.labels)
            rows += evaluate_case(running, case, classification=classification)
    records = [dataclasses.asdict(row) for row in rows]
    if csv_file:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["case", "label", *FIELDS])
        writer.writeheader()
        writer.writerows(records)
        write_atomic(csv_file, text.getvalue().encode())
    if json_output:
        json.dump(records, sys.stdout, indent=2)
        print()
        return
    table = Table("label", "cases", "Dice", "HD95 mm", "volume error %")
    for label in running.labels:
        mine = [row for row in rows if row.label == label]
        figures = [mean([getattr(row, name) for row in mine]) for name in FIELDS]
        shown = [
            "-" if v is None else f"{v:.{d}f}" for v, d in zip(figures, (3, 1, 1), strict=True)
        ]
        table.add_row(Text(printable(label)), str(len(mine)), *shown)
    Console().print(table)


def cases_of_site(folder: DataFolder, site: str | None) -> list[CaseRef]:
    """Return the cases of one site, or all of them for None.

    Raises:
        SettingsError: No case names this site.
    """
    refs = [ref for ref in folder.cases if site in (None, ref.site)]
    if not refs:
        known = sorted({repr(ref.site) for ref in folder.cases})
        msg = f"site: expected one of {', '.join(known)}, got {site!r}"
        raise SettingsError(msg)
    return refs
