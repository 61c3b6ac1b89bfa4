"""`dafne-federated simulate`: a whole federation on one machine, the main job."""

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.settings import read_settings


def simulate(
    data: Annotated[
        Path | None, typer.Argument(help="Folder of images; without it, phantom limbs are drawn.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Base .model, approved here; without it, one is trained.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; go on if it is one.")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="TOML with the names of these flags.")
    ] = None,
    base_site: Annotated[str | None, typer.Option(help="Site whose cases train the base.")] = None,
    base_persons: Annotated[int | None, typer.Option(help="Persons that train the base.")] = None,
    test_site: Annotated[str | None, typer.Option(help="Site that is only tested on.")] = None,
    sites: Annotated[
        int | None, typer.Option(help="Deal persons into so many sites, instead of the column.")
    ] = None,
    divide: Annotated[int | None, typer.Option(help="Divide each site into so many.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Relative sizes for --sites: 1,2,4.")] = None,
    shares: Annotated[
        str, typer.Option(help="Persons for training, validation, test in a site.")
    ] = "2,1,1",
    rounds: Annotated[int | None, typer.Option(help="Rounds of the federation. [5]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs in a round. [4]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam. [0.003]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Slices in a step. [4]")] = None,
    strategy: Annotated[str | None, typer.Option(help="product or factors. [product]")] = None,
    layers: Annotated[str | None, typer.Option(help="all, decoder or encoder. [all]")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank pairs. [4]")] = None,
    seed: Annotated[int | None, typer.Option(help="All randomness follows from it. [1]")] = None,
    gate: Annotated[str | None, typer.Option(help="validation or none. [validation]")] = None,
    margin: Annotated[
        float | None, typer.Option(help="Dice that a label of a site may lose. [0.02]")
    ] = None,
    base_epochs: Annotated[int, typer.Option(help="At most, to train a base.")] = 60,
    base_size: Annotated[int | None, typer.Option(help="Input of a trained base, pixels.")] = None,
    base_resolution: Annotated[float | None, typer.Option(help="Its pixel size, mm.")] = None,
    phantom_persons: Annotated[
        str, typer.Option(help="Phantom persons for the base and for each site.")
    ] = "10,8",
    engine: Annotated[str, typer.Option(help="inline (this process) or ray.")] = "inline",
    parallel: Annotated[int, typer.Option(min=1, help="Sites at a time, with ray.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads, 0 for all cores. [0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or gpu. [auto]")] = None,
    local_only: Annotated[bool, typer.Option(help="Train each site alone, too.")] = True,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Run a federation of many sites on this machine: base in, released .model and report out.

    Without arguments: phantom limbs, a base from one population, four sites from others.

    Example: dafne-federated simulate data/hippocampus --base-site A_8bit --divide 2 --rounds 5
    """
    chosen = read_settings(
        settings,
        rounds=rounds,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        strategy=strategy,
        layers=layers,
        rank=rank,
        seed=seed,
        gate=gate,
        margin=margin,
        threads=threads,
        device=device,
    )
    prepare_backend(chosen.threads, chosen.device)
    from dafne_federated.core.base_training import FitSettings
    from dafne_federated.simulations.partition import PartitionSettings
    from dafne_federated.simulations.progress import Stages
    from dafne_federated.simulations.simulate import NetworkChoice, Simulation
    from dafne_federated.simulations.simulate import simulate as run_simulation

    simulation = Simulation(
        run=run or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}",
        data=data,
        base=base,
        partition=PartitionSettings(
            base_site=base_site,
            base_persons=base_persons,
            test_site=test_site,
            sites=sites,
            divide=divide,
            sizes=numbers(sizes, "sizes") if sizes else None,
            shares=_three(shares),
        ),
        settings=chosen,
        fit=FitSettings(epochs=base_epochs, seed=chosen.seed),
        network=NetworkChoice(size=base_size, resolution=base_resolution),
        phantom_persons=_two(phantom_persons),
        engine=_one_of(engine, ("inline", "ray"), "engine"),
        parallel=parallel,
        local_only=local_only,
        command=shlex.join(["dafne-federated", *sys.argv[1:]]),
    )
    with Stages(quiet) as stages:
        folder = run_simulation(simulation, stages)
    _summary(folder.path)


def numbers(text: str, name: str) -> tuple[float, ...]:
    """Return the numbers of a text such as ``1,2,4``.

    Raises:
        SettingsError: It is something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        msg = f"{name}: expected numbers with commas between them, got {text!r}"
        raise SettingsError(msg) from None


def _three(text: str) -> tuple[float, float, float]:
    found = numbers(text, "shares")
    if len(found) != 3:
        msg = f"shares: expected three numbers, got {text!r}"
        raise SettingsError(msg)
    return found[0], found[1], found[2]


def _two(text: str) -> tuple[int, int]:
    found = numbers(text, "phantom-persons")
    if len(found) != 2 or min(found) < 1:
        msg = f"phantom-persons: expected two whole numbers above 0, got {text!r}"
        raise SettingsError(msg)
    return int(found[0]), int(found[1])


def _one_of(value: str, known: tuple[str, ...], name: str) -> str:
    if value not in known:
        msg = f"{name}: expected one of {', '.join(known)}, got {value!r}"
        raise SettingsError(msg)
    return value


def _summary(path: Path) -> None:
    from dafne_federated.core.run_folder import RunFolder
    from dafne_federated.simulations.comparison import compare
    from dafne_federated.simulations.test_results import ARMS, load_test_rows

    folder = RunFolder(path)
    result, plan = folder.result(), folder.plan()
    console = Console()
    table = Table("site", "persons", *ARMS, title="Mean Dice on persons that nobody trained on")
    if rows := load_test_rows(folder):
        compared = compare(rows, plan.labels)
        for line in (*compared.site_lines.values(), compared.total):
            shown = [line.dice(arm) for arm in ARMS]
            cells = ["-" if value is None else f"{value:.3f}" for value in shown]
            table.add_row(line.site or "all", str(line.persons), *cells)
        console.print(table)
    word = "Released" if result.released else "Nothing released"
    console.print(f"{word}: {result.reason}", highlight=False)
    if result.released:
        print(f"model:  {folder.release / result.release}")
        print(f"digest: {result.release_digest}")
        print(f"content digest: {result.content_digest}")
    print(f"report: {folder.report}")
