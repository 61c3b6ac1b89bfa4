"""`dafne-federated check-data`: what is wrong with a data folder, in plain words."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from dafne_federated.client.labels_here import labels_here
from dafne_federated.client.site_settings import SiteSettings, read_site
from dafne_federated.core.data_check import check_folder
from dafne_federated.core.dataset import open_folder
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.findings import (
    Finding,
    ModelExpectation,
    Severity,
    enumerated,
    expectation_of,
)
from dafne_federated.core.model_file import read_model
from dafne_federated.core.site_labels import SiteLabels

_STYLE: Final[dict[Severity, str]] = {"error": "red", "warning": "yellow", "note": "blue"}


def check_data(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Folder of NIfTI pairs (images/, labels/, dataset.json, participants.csv) or of "
            "Dafne bundles (*.npz).",
            show_default=False,
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="Model that shall be trained on the data: also checks labels, plane, pixel size "
            "and field of view against it. The model is read, not executed.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site",
            help="Settings of a site, for what it calls the labels of the model and which of them "
            "it annotated; with --model.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the findings as a JSON list.")
    ] = False,
) -> None:
    """Find what is wrong with images and labels before they are used for training.

    Example: dafne-federated check-data my-scans --model Thigh.model

    Ends with status 1 if anything must be put right first, and 0 otherwise.
    """
    expected = None if model is None else expectation_of(read_model(model))
    folder = open_folder(directory)
    here = None if site is None else _labels_of(read_site(site), expected)
    columns = (TextColumn("Checking"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(folder.cases))
        findings = check_folder(
            folder,
            expected,
            progress=lambda done, _: progress.update(task, completed=done),
            here=here,
        )
    if json_output:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        _print_tables(findings, folder.name, len(folder.cases))
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(1)


def _labels_of(site: SiteSettings, expected: ModelExpectation | None) -> SiteLabels:
    if expected is None or not expected.labels:
        msg = "site: expected a --model that states its labels beside it"
        raise SettingsError(msg)
    return labels_here(site, expected.labels)


def _print_tables(findings: Sequence[Finding], name: str, cases: int) -> None:
    console = Console()
    for severity, style in _STYLE.items():
        chosen = [finding for finding in findings if finding.severity == severity]
        if not chosen:
            continue
        title = Text(f"{severity.capitalize()}s", style=f"bold {style}")
        table = Table(title=title, title_justify="left", expand=True, show_lines=True)
        table.add_column("Where", ratio=2, overflow="fold")
        table.add_column("What was found", ratio=4)
        table.add_column("What to do", ratio=4)
        for (what, advice), names in _grouped(chosen).items():
            where = enumerated(names) if all(names) else "whole folder"
            table.add_row(Text(where), Text(what), Text(advice))
        console.print(table)
    counts = {
        severity: sum(finding.severity == severity for finding in findings) for severity in _STYLE
    }
    parts = enumerated([f"{number} {word}{'s' * (number != 1)}" for word, number in counts.items()])
    console.print(Text(f"{name}: {cases} cases, {parts}."), soft_wrap=True)


def _grouped(findings: Sequence[Finding]) -> dict[tuple[str, str], list[str]]:
    """Return the cases of each finding, so that what many share is said once."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for finding in findings:
        groups[finding.what, finding.advice].append(finding.case)
    return groups
