"""`dafne-federated simulate`: a whole federation on one machine, the main job."""

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dafne_federated.cli.panels import in_panels
from dafne_federated.cli.simulation_options import read_options
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.methods import METHODS
from dafne_federated.core.strategy_table import ROBUST_TABLE, STRATEGY_TABLE


@in_panels(
    {
        "Sites": (
            *("base_site", "base_persons", "test_site", "sites", "divide", "sizes", "shares"),
            *("without", "phantom_persons"),
        ),
        "Training": (
            *("rounds", "epochs", "learning_rate", "batch_size", "optimiser", "proximal"),
            *("statistics", "class_weights", "precision", "seed"),
        ),
        "What is trained": ("method", "layers", "last", "rank", "max_rank", "scale"),
        "Aggregation": (
            *("strategy", "robust", "bad_sites", "server_optimiser", "server_rate"),
            *("server_momentum", "local_rank", "wire", "max_cases", "max_norm_ratio"),
        ),
        "Privacy": ("privacy", "noise", "clip", "person_rate"),
        "Release": ("gate", "margin", "confidence", "min_persons", "reference"),
        "When a round closes": (
            *("min_sites", "sites_per_round", "deadline", "grace", "retries", "late", "wait"),
        ),
        "A base of one's own": ("base_epochs", "base_size", "base_resolution"),
        "This machine": ("engine", "parallel", "threads", "device", "local_only"),
    }
)
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
        str | None, typer.Option(help="Persons for training, validation, test. [2,1,1]")
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(help="Labels that sites shall lack, to see what it costs: site-2:disc,canal"),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the federation. [5]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs in a round. [4]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam. [0.003]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Slices in a step. [4]")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGY_TABLE)}. By default product.")
    ] = None,
    robust: Annotated[
        str | None, typer.Option(help=f"{', '.join(ROBUST_TABLE)}. By default none.")
    ] = None,
    bad_sites: Annotated[
        int | None, typer.Option(help="With robust: how many bad sites it bears. [1]")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}; several with + between them. By default lora."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="With lora: all, decoder or encoder. By default all.")
    ] = None,
    last: Annotated[int | None, typer.Option(help="With last-k: how many layers. [2]")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank pairs. [4]")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Largest accepted of a site. [16]")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of low-rank updates. [1]")] = None,
    wire: Annotated[
        str | None, typer.Option(help="States travel as float32 or float16. By default float32.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Of normalisations: base or pooled. By default base.")
    ] = None,
    class_weights: Annotated[
        str | None, typer.Option(help="Frequency of labels: case or pooled. By default case.")
    ] = None,
    privacy: Annotated[
        str | None, typer.Option(help="none, person or site: noise hides each. By default none.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="With privacy: a multiple of the clip. [2]")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="With privacy: the most that one adds. [0.1]")
    ] = None,
    person_rate: Annotated[
        float | None, typer.Option(help="With privacy person: share of persons in a step. [0.5]")
    ] = None,
    optimiser: Annotated[
        str | None,
        typer.Option(help="Of the sites: fresh in each round, or kept. By default fresh."),
    ] = None,
    proximal: Annotated[
        float | None, typer.Option(help="How strongly sites hold to what they received. [0]")
    ] = None,
    server_optimiser: Annotated[
        str | None, typer.Option(help="none, momentum or adam. By default none.")
    ] = None,
    server_rate: Annotated[
        float | None, typer.Option(help="Of the server: size of its steps. [1, with adam 0.01]")
    ] = None,
    server_momentum: Annotated[
        float | None, typer.Option(help="Of the server: how much of its memory stays. [0.9]")
    ] = None,
    local_rank: Annotated[
        int | None, typer.Option(help="With global+local: rank of each site's own part. [2]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="All randomness follows from it. [1]")] = None,
    gate: Annotated[
        str | None, typer.Option(help="validation or none. By default validation.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Dice that a label of a site may lose. [0.05]")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="With which a larger loss is excluded. [0.95]")
    ] = None,
    min_persons: Annotated[
        int | None, typer.Option(help="Without so many who accept no release. [3]")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of images that the gate looks at, too.")
    ] = None,
    min_sites: Annotated[int | None, typer.Option(help="Without so many no round. [2]")] = None,
    sites_per_round: Annotated[
        int | None, typer.Option(help="So many, drawn anew, train in a round; 0 for all. [0]")
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Longer wait if too few answered, seconds. [0]")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Times to ask again if too few answered. [1]")
    ] = None,
    late: Annotated[
        str | None, typer.Option(help="Update after its round: drop or use. By default drop.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Of a round, seconds. [3600]")] = None,
    wait: Annotated[float | None, typer.Option(help="For the sites, seconds. [300]")] = None,
    max_cases: Annotated[
        int | None, typer.Option(help="Training cases that a site may claim. [100000]")
    ] = None,
    max_norm_ratio: Annotated[
        float | None, typer.Option(help="Update refused above so many times the median. [20]")
    ] = None,
    base_epochs: Annotated[int | None, typer.Option(help="At most, for a base. [60]")] = None,
    base_size: Annotated[int | None, typer.Option(help="Input of a trained base, pixels.")] = None,
    base_resolution: Annotated[float | None, typer.Option(help="Its pixel size, mm.")] = None,
    phantom_persons: Annotated[
        str | None, typer.Option(help="Phantom persons for the base and each site. [10,8]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="inline (this process) or ray. By default inline.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(help="Sites at a time, with ray. [1]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, 0 for all cores. [0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or gpu. By default auto.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of training, float32 or bfloat16. By default float32.")
    ] = None,
    local_only: Annotated[
        bool | None,
        typer.Option(
            "--local-only/--no-local-only", help="Train each site alone, too. By default yes."
        ),
    ] = None,
    quiet: Annotated[bool | None, typer.Option("--quiet", help="No progress bars.")] = None,
) -> None:
    """Run a federation of many sites on this machine: base in, released .model and report out.

    Without arguments: phantom limbs, a base from one population, four sites from others.

    Example: dafne-federated simulate data/hippocampus --base-site A_8bit --divide 2 --rounds 5
    """
    flags = {name: value for name, value in locals().items() if name != "settings"}
    given = {name.replace("_", "-"): v for name, v in flags.items() if v is not None}
    options, chosen, names = read_options(settings, given)
    prepare_backend(chosen.threads, chosen.device)
    from dafne_federated.core.base_training import FitSettings
    from dafne_federated.simulations.partition import PartitionSettings
    from dafne_federated.simulations.preparation import NetworkChoice, Simulation
    from dafne_federated.simulations.progress import Stages
    from dafne_federated.simulations.simulate import simulate as run_simulation

    simulation = Simulation(
        run=options.run or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}",
        data=options.data,
        base=options.base,
        partition=PartitionSettings(
            base_site=options.base_site,
            base_persons=options.base_persons,
            test_site=options.test_site,
            sites=options.sites,
            divide=options.divide,
            sizes=options.sizes,
            shares=options.shares,
            without=options.without,
        ),
        settings=chosen,
        fit=FitSettings(epochs=options.base_epochs, seed=chosen.seed),
        network=NetworkChoice(size=options.base_size, resolution=options.base_resolution),
        phantom_persons=options.phantom_persons,
        engine=options.engine,
        parallel=options.parallel,
        local_only=options.local_only,
        command=shlex.join(["dafne-federated", *sys.argv[1:]]),
        given=names,
    )
    with Stages(options.quiet) as stages:
        folder = run_simulation(simulation, stages)
    _summary(folder.path)


def _summary(path: Path) -> None:
    from dafne_federated.core.run_folder import RunFolder
    from dafne_federated.simulations.aggregation_words import aggregation_words
    from dafne_federated.simulations.comparison import compare
    from dafne_federated.simulations.release_check import load_release_check
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
    if words := aggregation_words(folder.info(), plan, folder.rounds()):
        console.print(words, highlight=False)
    word = "Released" if result.released else "Nothing released"
    console.print(f"{word}: {result.reason}", highlight=False)
    if result.released:
        print(f"model:  {folder.release / result.release}")
        print(f"digest: {result.release_digest}")
        print(f"content digest: {result.content_digest}")
        if check := load_release_check(folder):
            print(check)
    print(f"report: {folder.report}")
