"""`dafne-federated benchmark`: arms against each other, on persons that nothing was chosen on."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.core.errors import RunError, SettingsError


def benchmark(
    scenario: Annotated[
        str, typer.Argument(help="Name of a scenario that comes along, or a .toml file.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, or the one that holds it by the scenario's name for it.",
            envvar="DAFNE_FEDERATED_TEST_DATA",
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder; goes on if it is one.")] = None,
    only: Annotated[str | None, typer.Option(help="Arms to run, with commas between.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each. [all cores]")
    ] = None,
    memory: Annotated[
        float, typer.Option(min=1, help="Most memory of all of them together, in GiB.")
    ] = 18.0,
    final: Annotated[
        bool, typer.Option(help="Afterwards make the test; no fit can be added then.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder to keep lines and table in, without images.")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing until the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Fit all arms of a scenario at all sizes and seeds, choose settings, and compare.

    Persons are divided once. Settings are chosen on development persons; the test persons are
    only looked at with --final, once. A run that was stopped goes on where it was.

    Example: dafne-federated benchmark phantoms --run runs/phantoms
    """
    from dafne_federated.simulations.benchmark_folder import BenchmarkFolder
    from dafne_federated.simulations.benchmark_report import write_benchmark_report
    from dafne_federated.simulations.benchmark_results import keep_results
    from dafne_federated.simulations.benchmark_run import Benchmark, run_benchmark
    from dafne_federated.simulations.benchmark_scenario import read_scenario
    from dafne_federated.simulations.benchmark_table import markdown, measured, table

    name, content = read_scenario(scenario)
    folder = BenchmarkFolder((run or Path("runs") / name).resolve())
    arms = tuple(filter(None, (only or "").split(",")))
    if unknown := [arm for arm in arms if arm not in content.arms]:
        msg = f"only: expected some of {', '.join(content.arms)}, got {unknown[0]!r}"
        raise SettingsError(msg)
    job = Benchmark(
        folder=folder,
        name=name,
        scenario=content,
        data=data,
        workers=workers or len(os.sched_getaffinity(0)),
        memory_gib=memory,
        only=arms,
        command=shlex.join(["dafne-federated", *sys.argv[1:]]),
        tell=(lambda _line: None) if quiet else lambda line: print(line, file=sys.stderr),
    )
    failed = run_benchmark(job, final)
    found = measured(folder)
    rows = table(folder, found)
    shown = json.dumps([row.as_json() for row in rows], indent=1)
    print(shown if as_json else markdown(rows, found.tested))
    if results is not None:
        keep_results(folder, found, results)
    report = write_benchmark_report(folder)
    job.tell(f"report, with pictures of persons: {report}")
    if failed:
        msg = f"{len(failed)} pieces failed, first {failed[0]}; start again to try them again"
        raise RunError(msg)
