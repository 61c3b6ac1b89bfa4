"""`dafne-federated methods`: what each adaptation method trains and costs on a model."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.dataset import load_case, open_folder
from dafne_federated.core.dry_run import Bench, DryRun, bench_of, dry_run, physical_memory_mib
from dafne_federated.core.errors import RunError
from dafne_federated.core.model_file import read_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.settings import read_settings

if TYPE_CHECKING:
    from dafne_federated.core.method_costs import Cost

_SLICES = 100


def methods(
    model: Annotated[Path, typer.Argument(help="A Dafne .model, approved on this machine.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of your images; tells how many slices an epoch has."),
    ] = None,
    slices: Annotated[
        int | None,
        typer.Option(min=1, help=f"Slices in an epoch; else those of the data, or {_SLICES}."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this method, or several joined by +; can be given repeatedly."),
    ] = None,
    timing: Annotated[
        bool, typer.Option("--timing/--no-timing", help="Measure time and memory by a dry run.")
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank pairs. [4]")] = None,
    last: Annotated[int | None, typer.Option(help="Layers of last-k. [2]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Slices in a step. [4]")] = None,
    classification: Annotated[
        str, typer.Option(help="Class of the data as Dafne names it, e.g. 'Thigh, Left'.")
    ] = "",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
) -> None:
    """Show what each method trains on a model, what it costs here, and which one to take.

    Example: dafne-federated methods Thigh_1700000000.model --slices 60

    Each method takes three training steps on random input, in a process of its own; the first
    step is not counted. Recommended is the first of lora, lora in the decoder, ssf and head
    that needs less than 80 % of this machine's memory and ends an epoch within five minutes,
    otherwise the fastest that memory allows; full comes first where lora would train more than
    half of the model.
    """
    settings = read_settings(None, rank=rank, last=last, batch_size=batch_size)
    chosen = [
        read_settings(None, **(settings.model_dump() | {"method": name})) for name in only or ()
    ]
    file = read_model(model)
    Approvals().require(file)
    used = prepare_backend(threads, device)
    from dafne_federated.core.method_costs import left_out, planned_cost, recommend, usual_settings
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.network_layers import describe_layers

    running = RunningModel(file, Approvals())
    found = [planned_cost(running, one) for one in chosen or usual_settings(settings)]
    costs = [cost for cost, _ in found]
    count = slices or _SLICES
    if timing:
        folder = None if data is None else open_folder(data)
        cases = folder.cases if folder else ()
        case = load_case(cases[0], folder.labels) if folder and cases else None
        with bench_of(model, case, classification, settings.batch_size, threads, device) as bench:
            runs = _dry_runs(bench, found)
        kept = [run.kept_slices * len(cases) for run in runs if isinstance(run, DryRun)]
        count = slices or next((number for number in kept if number), _SLICES)
        costs = [
            cost.measured(run, count, settings.batch_size)
            if isinstance(run, DryRun)
            else dataclasses.replace(cost, failed=run)
            for cost, run in zip(costs, runs, strict=True)
        ]
    memory = physical_memory_mib()
    advice = recommend(costs, memory)
    notes = left_out(describe_layers(running.network))
    if timing:
        notes.append(
            f"An epoch is {count} slices in steps of {settings.batch_size} on {used.name}, with "
            f"outputs of frozen layers kept on disk where they are worth it; memory is that of "
            f"the process, not of a graphics card."
        )
    if json_output:
        facts = {
            "model": file.digest,
            "parameters": file.parameters,
            "slices": count,
            "batch-size": settings.batch_size,
            "device": used.name,
            "memory-mib": memory,
            "methods": [dataclasses.asdict(cost) for cost in costs],
            "notes": notes,
            "recommended": advice,
        }
        print(json.dumps(facts, indent=2))
        return
    _print(f"{model.name}, {file.parameters:,} values", costs, timing)
    for line in (*notes, advice):
        Console(soft_wrap=True).print(Text(line))


def _dry_runs(
    bench: Bench, found: Sequence[tuple["Cost", AdaptationPlan | None]]
) -> list[DryRun | str]:
    """Return for each plan what it costs, or in words why that is not known."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    runs: list[DryRun | str] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Measuring", total=len(found))
        for cost, plan in found:
            progress.update(task, description=f"Measuring {cost.method}")
            try:
                runs.append("" if plan is None else dry_run(bench, plan))
            except RunError as error:
                runs.append(str(error))
            progress.advance(task)
    return runs


def _print(title: str, costs: Sequence["Cost"], timing: bool) -> None:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("--method", no_wrap=True)
    table.add_column("trains", ratio=1)
    numbers = ["values", "bytes", "% of all", "frozen prefix"]
    for name in [*numbers, *(["s / epoch", "peak MiB (training)"] if timing else [])]:
        table.add_column(name, justify="right")
    for cost in costs:
        if cost.refused:
            table.add_row(cost.method, Text(f"not possible: {cost.refused}", style="dim"))
            continue
        words = cost.trains + (f"; dry run failed: {cost.failed}" if cost.failed else "")
        cells = [f"{cost.parameters:,}", f"{cost.bytes:,}", f"{100 * cost.share:.3g}"]
        frozen = "?" if cost.frozen is None else f"{100 * cost.frozen:.0f} %"
        cells.append(f"{frozen}, cacheable" if cost.cacheable else frozen)
        if timing:
            cells.append(_figure(cost.epoch_seconds, ".3g"))
            peak = _figure(cost.peak_mib, ",.0f")
            cells.append(f"{peak} ({_figure(cost.training_mib, ',.0f')})")
        table.add_row(cost.method, Text(words), *cells)
    Console().print(table)


def _figure(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)
