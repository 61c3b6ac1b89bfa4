"""Every strategy on the same federation of real images: Dice, bytes, aggregation error, seconds.

Run: python benchmarks/strategies.py --keep DIR [--data FOLDER] [--seeds 1 2] [--tiny]

Persons of the lumbar spine set (``--data``, else ``lumbar_spine`` in the folder that the variable
DAFNE_FEDERATED_TEST_DATA names) are divided once: some train a base, the others are dealt to four
sites of sizes 1 to 4 and there into training, validation and test. All rows start from that base,
with the same persons in the same places; only the strategy and the seed of training differ. The
rows are those of the table of strategies, a strategy that is new there among them, and some with
a robust rule, ranks of the sites' own or sampling of sites. A strategy for whole arrays trains
another method than low-rank pairs, which stands in its row.

Each row and seed is one run in ``--keep``; what is finished there is not done again, and what was
cut short goes on after its last round.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import read_settings
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.simulations.comparison import compare
from dafne_federated.simulations.test_results import load_test_rows
from dafne_federated.strategies import STRATEGIES

PACKAGES = ("keras", "tensorflow", "numpy", "dafne-dl")
DIVISION = 1  # seed of who is where, and of the base
ALONE = "product"  # the row that base and local only are taken from
RANKS = (2, 4, 8, 16)  # of the sites, in the rows with ranks of their own
COMMON = {
    "epochs": 2,
    "batch_size": 4,
    "rank": 4,
    "max_rank": 16,
    "margin": 0.05,
    "min_sites": 2,
    "device": "cpu",
    "threads": 1,
}
FULL = {
    "rounds": 4,
    "base_persons": 8,
    "base_epochs": 12,
    "resolution": 1.875,
    "filters": [8, 16, 32, 64],
}
TINY = FULL | {"rounds": 2, "base_epochs": 1, "resolution": 7.5, "filters": [4, 8, 8, 8]}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: what differs from the common settings, and ranks of the sites' own."""

    settings: dict
    ranks: tuple[int, ...] = ()


def rows():
    """Return all rows by name."""
    made = {}
    for name in STRATEGIES:
        rules = STRATEGY_TABLE[name]
        method = {"method": "norm+head"} if rules.pairs == "never" else {}
        label = f"{name}, {method['method']}" if method else name
        made[label] = Row({"strategy": name, **method})
    for name, rules in STRATEGY_TABLE.items():
        if rules.ranks:
            shown = "/".join(map(str, RANKS))
            made[f"{name}, ranks {shown}"] = Row({"strategy": name, "rank": max(RANKS)}, RANKS)
    for rule in ("clipped", "geometric-median"):
        made[f"product, {rule}"] = Row({"strategy": "product", "robust": rule, "min_sites": 3})
    made["product, 2 sites a round"] = Row({"strategy": "product", "sites_per_round": 2})
    return made


def folder_of(keep, name, seed):
    return RunFolder(keep / f"{name.replace(', ', '-').replace(' ', '-').replace('/', '-')}-{seed}")


def quiet():
    """Hide what TensorFlow and its helpers say, in a child process."""
    import warnings

    warnings.simplefilter("ignore")
    from dafne_federated.core.backend import prepare_backend

    prepare_backend(1, "cpu")


def make_base(keep, design):
    """Divide the persons and train the base; both are kept."""
    quiet()
    from dafne_federated.core.base_training import FitSettings
    from dafne_federated.simulations.partition import PartitionSettings
    from dafne_federated.simulations.preparation import NetworkChoice, Simulation, prepare
    from dafne_federated.simulations.progress import Stages

    os.environ["DAFNE_FEDERATED_HOME"] = str(keep / "home")
    simulation = Simulation(
        run=keep / "base",
        data=Path(design["data"]),
        partition=PartitionSettings(
            base_persons=design["base_persons"], sites=4, sizes=(1.0, 2.0, 3.0, 4.0)
        ),
        settings=read_settings(None, **COMMON, seed=DIVISION),
        fit=FitSettings(epochs=design["base_epochs"], seed=DIVISION),
        network=NetworkChoice(resolution=design["resolution"], filters=tuple(design["filters"])),
        command="benchmarks/strategies.py",
    )
    with Stages(quiet=True) as stages:
        prepare(simulation, stages)


def run_row(keep, design, name, seed):
    """Run a row with one seed, or what is left of it, and test it."""
    quiet()
    from dafne_federated.client.site_settings import read_site
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.files import write_atomic
    from dafne_federated.core.model_file import read_model
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.new_run import make_plan, start_run
    from dafne_federated.simulations.inline_engine import run_inline
    from dafne_federated.simulations.preparation import keep_site, read_prepared
    from dafne_federated.simulations.progress import Stages
    from dafne_federated.simulations.simulate import site_folders
    from dafne_federated.simulations.testing import measure

    os.environ["DAFNE_FEDERATED_HOME"] = str(keep / "home")
    row, folder = rows()[name], folder_of(keep, name, seed)
    settings = read_settings(
        None, **COMMON | {"rounds": design["rounds"], "seed": seed} | row.settings
    )
    base = keep / "base"
    if not (folder.path / "run.json").exists():
        folder.path.mkdir(exist_ok=True)
        file = read_model(base / "trained-base.model")
        approvals = Approvals(base / "approved-models.json")
        sites = [read_site(path) for path in sorted((base / "sites").glob("*.json"))]
        for number, site in enumerate(sites):
            rank = row.ranks[number] if row.ranks else None
            keep_site(folder.path, site.model_copy(update={"rank": rank, "prefix_cache": False}))
        for path in (base / "partition.json", approvals.path):
            write_atomic(folder.path / path.name, path.read_bytes())
        plan = make_plan(RunningModel(file, approvals), settings)
        start_run(
            folder.path, base / "base.model", file, plan, settings, "benchmarks/strategies.py"
        )
    sites = site_folders(folder)
    if not (folder.path / "result.json").exists():
        run_inline(folder.path, len(sites))
    # The sites alone are the same for every strategy of a method: one row has them.
    prepared = read_prepared(folder).model_copy(update={"local_only": name == ALONE})
    with Stages(quiet=True) as stages:
        measure(folder, prepared, sites, stages)


def start(keep, name, seed):
    """Run a child process to its end."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--keep", str(keep), "--child", name, str(seed)]
    with (keep / "log.txt").open("ab") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    seconds = time.perf_counter() - begun
    word = "done" if status == 0 else f"ended with status {status}, see log.txt"
    print(f"{name}, seed {seed}: {word} in {seconds:.0f} s", file=sys.stderr, flush=True)


def finished(keep, name, seed):
    return (folder_of(keep, name, seed).path / "test.json").exists()


def scores(folder, arm):
    """Return the mean Dice over test persons and the lowest mean of a site."""
    compared = compare(load_test_rows(folder), folder.plan().labels)
    persons = [means[arm] for means in compared.persons.values() if arm in means]
    sites = [line.dice(arm) for line in compared.site_lines.values()]
    return statistics.fmean(persons), min(value for value in sites if value is not None)


def spread(values, shown="{:.3f}"):
    """Return the mean and, of several values, their range."""
    text = shown.format(statistics.fmean(values))
    if len(values) > 1:
        text += f" ({shown.format(min(values))} to {shown.format(max(values))})"
    return text


def kib(lines, key):
    """Return KiB of one site in one round of training; the first, with the base, is left out."""
    later = [line for line in lines if line.trained][1:] or lines
    return (
        statistics.fmean(getattr(site, key) for line in later for site in line.sites.values())
        / 1024
    )


def cells(keep, name, seeds):
    """Return the cells of one row."""
    folders = [folder_of(keep, name, seed) for seed in seeds]
    found = [scores(folder, "federated") for folder in folders]
    lines = [folder.rounds() for folder in folders]
    errors = [[e for e in (r.aggregation_error for r in run) if e is not None] for run in lines]
    personal = STRATEGY_TABLE[folders[0].info().settings.strategy].odd.personal
    shown = [
        f"{100 * statistics.fmean(run[i] for run in errors):.2g}" for i in range(len(errors[0]))
    ]
    results = [folder.result() for folder in folders]
    training = [sum(s.seconds for line in run for s in line.sites.values()) for run in lines]
    combining = [
        statistics.fmean(line.aggregation_seconds for line in run if line.trained) for run in lines
    ]
    return [
        name,
        spread([dice for dice, _ in found]),
        spread([low for _, low in found]),
        "/".join("-" if result.round is None else str(result.round) for result in results),
        spread([kib(run, "bytes_down") for run in lines], "{:.1f}"),
        spread([kib(run, "bytes_up") for run in lines], "{:.1f}"),
        "not known" if personal else ", ".join(shown),
        spread(combining, "{:.2g}"),
        spread(training, "{:.1f}"),
        spread([sum(line.seconds for line in run) for run in lines], "{:.0f}"),
    ]


def table(keep, seeds):
    head = ["row", "Dice", "lowest site", "round", "KiB down", "KiB up", "error by round, %"]
    head += ["s to combine", "s of training", "s in all"]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    missing = []
    done = {name: [seed for seed in seeds if finished(keep, name, seed)] for name in rows()}
    reference = [folder_of(keep, ALONE, seed) for seed in done[ALONE]]
    for arm in ("base", "local only"):
        if reference:
            found = [scores(folder, arm) for folder in reference]
            own = [arm, *(spread(list(values)) for values in zip(*found, strict=True))]
            print("| " + " | ".join(own + [""] * (len(head) - len(own))) + " |")
    for name, kept in done.items():
        if kept:
            print("| " + " | ".join(cells(keep, name, kept)) + " |")
        missing += [f"{name}, seed {seed}" for seed in seeds if seed not in kept]
    if missing:
        print(f"\nnot finished: {'; '.join(missing)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, help="folder; goes on if it is one")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these words")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiny", action="store_true", help="a network of nothing, no result")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep = options.keep.resolve()
    if options.child:
        design = json.loads((keep / "design.json").read_text())
        name, seed = options.child
        if name == "base":
            make_base(keep, design)
        else:
            run_row(keep, design, name, int(seed))
        return
    data = options.data or Path(os.environ.get("DAFNE_FEDERATED_TEST_DATA", "."), "lumbar_spine")
    if not (data / "participants.csv").exists():
        print(f"skipped: no images in {str(data)!r}; give --data or DAFNE_FEDERATED_TEST_DATA")
        return
    design = (TINY if options.tiny else FULL) | {"data": str(data.resolve())}
    keep.mkdir(parents=True, exist_ok=True)
    kept, text = keep / "design.json", json.dumps(design, indent=1)
    if kept.exists() and kept.read_text() != text:
        sys.exit(f"{kept} holds another design; choose another --keep")
    kept.write_text(text)
    print(f"command: python benchmarks/strategies.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    print(f"design: {json.dumps(design | COMMON | {'data': data.name, 'division': DIVISION})}")
    print(
        f"seeds {options.seeds}; {options.workers} rows at a time, one thread each\n"
        "Dice: mean over test persons; lowest site: mean over its persons; round: the one that the "
        "gate chose, - for none (then the last is shown)\n"
        "KiB: of one site and round of training after the first; several values: mean (range) of "
        "the seeds, error by round: mean of the seeds",
        flush=True,
    )
    begun = time.perf_counter()
    if not (keep / "base" / "run.json").exists():
        start(keep, "base", 0)
    chosen = []
    for name, row in rows().items():
        if options.only and not any(word in name for word in options.only):
            continue
        try:
            read_settings(None, **COMMON | row.settings)
        except SettingsError as error:
            print(f"left out: {name}: {error}")
            continue
        chosen += [(name, seed) for seed in options.seeds if not finished(keep, name, seed)]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda one: start(keep, *one), chosen))
    table(keep, options.seeds)
    print(f"\n{time.perf_counter() - begun:.0f} s for {len(chosen)} runs")


if __name__ == "__main__":
    main()
