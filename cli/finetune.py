"""`dafne-federated finetune`: a base adapted to the images of one site."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dafne_federated.cli.evaluate import cases_of_site
from dafne_federated.cli.output_file import check_output
from dafne_federated.cli.printable import printable
from dafne_federated.cli.simulation_options import numbers
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.dataset import open_folder
from dafne_federated.core.errors import RunError, SettingsError
from dafne_federated.core.fine_tuning_settings import fine_tuning_settings
from dafne_federated.core.methods import METHODS
from dafne_federated.core.model_file import read_model
from dafne_federated.simulations.fine_tuning_labels import choose_labels

if TYPE_CHECKING:
    from dafne_federated.simulations.fine_tuning_run import FineTuningOutcome


def finetune(
    model: Annotated[Path, typer.Argument(help="A Dafne .model, approved on this machine.")],
    data: Annotated[Path, typer.Argument(help="Folder of NIfTI pairs or Dafne bundles.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .model file.")],
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run, by default OUTPUT.run; go on if it is one."),
    ] = None,
    site: Annotated[str | None, typer.Option(help="Only the cases of this site.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Labels of the new model, with commas, or 'base' for those of MODEL; by "
            "default those of the data where MODEL lacks some."
        ),
    ] = None,
    shares: Annotated[str, typer.Option(help="Persons for training, validation, test.")] = "2,1,1",
    schedule: Annotated[
        str | None, typer.Option(help="all (default), or gradual: from the output backwards.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many passes. [40]")] = None,
    patience: Annotated[
        int | None, typer.Option(help="A stage ends after so many without gain. [10]")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}; several with + between them. By default lora."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="With lora: all (default), decoder or encoder.")
    ] = None,
    last: Annotated[int | None, typer.Option(help="With last-k: how many layers. [2]")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank pairs. [4]")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of low-rank updates. [1]")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of Adam at the start of a stage. [0.003]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Slices in a step. [4]")] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="Of normalisations: base (default), or pooled: of the training slices."),
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(help="Label frequency in the loss: case (default), or pooled: of all."),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="validation (default), or none: write in any case.")
    ] = None,
    classification: Annotated[
        str, typer.Option(help="Class of the data as Dafne names it, e.g. 'Thigh, Left'.")
    ] = "",
    seed: Annotated[int | None, typer.Option(help="All randomness follows from it. [1]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, 0 for all cores. [0]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Convolutions in float32 (default) or bfloat16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or gpu.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Adapt a model to your own images; write the new .model only if it is better.

    Persons are divided: for training, for choosing the best epoch, and for a test at the end. A
    run that was stopped goes on with the same command and ends in the same model.

    Example: dafne-federated finetune Thigh_1700000000.model data/thigh -o Ours.model
    """
    settings = fine_tuning_settings(
        schedule=schedule,
        epochs=epochs,
        patience=patience,
        method=method,
        layers=layers,
        last=last,
        rank=rank,
        scale=scale,
        statistics=statistics,
        class_weights=class_weights,
        learning_rate=learning_rate,
        batch_size=batch_size,
        gate=gate,
        seed=seed,
        threads=threads,
        device=device,
        precision=precision,
    )
    parts = _shares(shares)
    approvals = Approvals()
    folder_of_run = run or output.with_name(f"{output.name.removesuffix('.model')}.run")
    if folder_of_run == output:
        msg = f"output: expected another path than that of the run, got {str(output)!r} for both"
        raise SettingsError(msg)
    check_output(output)
    check_output(approvals.path, replace=True)
    folder = open_folder(data)
    refs = cases_of_site(folder, site)
    given = read_model(model)
    approvals.require(given)
    choice = choose_labels(given, folder, refs, labels)
    if choice.note:
        print(printable(choice.note), file=sys.stderr)
    prepare_backend(settings.threads, settings.device)
    from dafne_federated.simulations.fine_tuning_run import FineTuningJob, run_fine_tuning
    from dafne_federated.simulations.progress import Stages

    job = FineTuningJob(
        given=given,
        labels=choice.labels,
        data=folder,
        cases=refs,
        output=output,
        run=folder_of_run,
        settings=settings,
        shares=parts,
        classification=classification,
        command=shlex.join(["dafne-federated", *sys.argv[1:]]),
    )
    try:
        with Stages(quiet or json_output) as stages:
            outcome = run_fine_tuning(job, stages)
    except KeyboardInterrupt:
        msg = "stopped; the same command goes on after the last whole epoch"
        raise RunError(msg) from None
    if json_output:
        _print_json(outcome)
    else:
        _summary(outcome, output)
    if not outcome.result.written:
        msg = f"{output} was not written: {outcome.result.reason}"
        raise RunError(msg)


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = numbers(text)
    except ValueError as error:
        msg = f"shares: {error}, got {text!r}"
        raise SettingsError(msg) from None
    if not isinstance(shares, tuple) or len(shares) != 3 or not shares[0] > 0:
        msg = f"shares: expected three numbers, the first above 0, got {text!r}"
        raise SettingsError(msg)
    return shares


def _summary(outcome: "FineTuningOutcome", output: Path) -> None:
    from dafne_federated.simulations.comparison import compare
    from dafne_federated.simulations.fine_tuning_report import NEW, persons_note

    console = Console(soft_wrap=True)
    if outcome.rows:
        compared = compare(outcome.rows, ())
        table = Table(
            "label", "persons", "Dice base", "new", "HD95 mm base", "new", "volume error % base",
            "new", title="Persons that nobody trained on",
        )  # fmt: skip
        lines = [line for lines in compared.lines.values() for line in lines]
        for line in (*lines, compared.total):
            means = [line.means.get(arm) for arm in ("base", NEW)]
            cells = [_figure(m.dice if m else None, 3) for m in means]
            cells += [_figure(m.hd95 if m else None, 1) for m in means]
            cells += [_figure(m.volume_bias if m else None, 1) for m in means]
            table.add_row(Text(printable(line.label or "all")), str(line.persons), *cells)
        console.print(table)
    if note := persons_note(outcome.info.persons):
        console.print(Text(note))
    if outcome.result.written:
        console.print(Text(outcome.result.reason))
        print(f"model:  {output}")
        print(f"digest: {outcome.result.digest}")
        print(f"content digest: {outcome.result.content_digest}")
    print(f"report: {outcome.folder.report}")


def _print_json(outcome: "FineTuningOutcome") -> None:
    facts = {
        "result": outcome.result.model_dump(mode="json"),
        "persons": outcome.info.persons,
        "epochs": [line.model_dump(mode="json") for line in outcome.epochs],
        "test": [row.model_dump(mode="json") for row in outcome.rows],
        "report": str(outcome.folder.report),
    }
    print(json.dumps(facts, indent=2))


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
