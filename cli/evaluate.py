"""`dafne-federated evaluate`: a model against masks that people drew."""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.metrics import Agreement, mean

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
    prepare_backend(threads, device)
    from dafne_federated.core.dataset import load_case, open_folder
    from dafne_federated.core.evaluation import evaluate_case
    from dafne_federated.core.model_file import read_model
    from dafne_federated.core.model_runtime import RunningModel

    folder = open_folder(data)
    refs = [ref for ref in folder.cases if site in (None, ref.site)]
    file = read_model(model)
    Approvals().require(file)
    running = RunningModel(file, Approvals())
    rows: list[Agreement] = []
    with Progress(console=Console(stderr=True), disable=json_output) as progress:
        for ref in progress.track(refs, description="Evaluating"):
            case = load_case(ref, folder.labels)
            rows += evaluate_case(running, case, classification=classification)
    records = [dataclasses.asdict(row) for row in rows]
    if csv_file:
        with csv_file.open("w", newline="", encoding="utf-8") as file_handle:
            writer = csv.DictWriter(file_handle, ["case", "label", *FIELDS])
            writer.writeheader()
            writer.writerows(records)
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
        table.add_row(label, str(len(mine)), *shown)
    Console().print(table)
