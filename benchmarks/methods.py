"""Every adaptation method on real images, next to training from scratch and full fine-tuning.

Run: python benchmarks/methods.py --run DIR [--data FOLDER] [--quick] [--rates 1e-3 3e-3 1e-2]

Persons of the hippocampus set (``--data``, else ``hippocampus`` in the folder that the variable
DAFNE_FEDERATED_TEST_DATA names) are divided once. Those of the base train a network that finds
the whole hippocampus; the task is then a new one, its anterior and posterior part. All arms see
the same prepared slices of the training persons in the same number of passes, and keep the
epoch with the best Dice on the validation slices. The learning rate of each arm is the one of
the grid that does best on the validation persons with the first seed. The test persons are
touched once, at the end, by the fits with the chosen rate. Finished fits are never run again.
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

import numpy as np

PACKAGES = ("keras", "tensorflow", "numpy", "dafne-dl")
DRAWS = 10_000
FULL = {
    "persons": (60, 10, 6, 24),
    "base_epochs": 8,
    "epochs": 30,
    "rates": (1e-3, 3e-3, 1e-2),
    "seeds": (1, 2, 3),
    "filters": (16, 32, 64, 128),
}
QUICK = FULL | {
    "persons": (8, 3, 2, 3),
    "base_epochs": 2,
    "epochs": 3,
    "rates": (3e-3,),
    "seeds": (1, 2),
}


def child(folder, name, index):
    """Prepare what all arms share, or run one arm."""
    import warnings

    warnings.simplefilter("ignore")
    from dafne_federated.core.backend import prepare_backend

    prepare_backend(1 if name else 0, "cpu")
    from methods_data import Design, Shared
    from methods_fits import run_arm

    design = json.loads((folder / "design.json").read_text())
    kept = {key: tuple(v) if isinstance(v, list) else v for key, v in design.items()}
    shared = Shared(folder, Design(**kept))
    if name:
        run_arm(shared, name, lines_of(folder, index))
    else:
        shared.prepare()


def lines_of(folder, index):
    return folder / f"arm-{index:02d}.jsonl"


def start(folder, name, index, said):
    """Run a child process to its end; return the seconds that it took."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--run", str(folder), "--child", name, str(index)]
    with (folder / "log.txt").open("ab") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    seconds = time.perf_counter() - begun
    word = "done" if status == 0 else f"ended with status {status}, see log.txt"
    print(f"{said}: {word} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds


def bootstrap(values, seed=1):
    """Return a 95 percent interval of the mean, persons drawn with replacement."""
    values = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    return np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])


def known_mean(values):
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else float("nan")


def person_dice(tests, key="persons"):
    """Return the Dice of each person, mean over seeds and labels, in the order of names."""
    return {
        person: statistics.fmean(
            known_mean([dice for dice, _ in test[key][person].values()]) for test in tests
        )
        for person in sorted(tests[0][key])
    }


def row(name, lines, scratch):
    """Return the cells of one arm."""
    from methods_fits import chosen_rate

    tests = [line for line in lines if line["kind"] == "test"]
    rate = chosen_rate(lines)
    fits = [f for f in lines if f["kind"] == "fit" and f["rate"] == rate]
    persons = person_dice(tests)
    low, high = bootstrap(list(persons.values()))
    of_seeds = [statistics.fmean(person_dice([test]).values()) for test in tests]
    labels = list(next(iter(tests[0]["persons"].values())))

    def of_label(label, place):
        found = [test["persons"][person][label][place] for test in tests for person in persons]
        return known_mean(found)

    cells = [
        name,
        f"{rate:g}",
        f"{statistics.fmean(persons.values()):.4f} ({low:.4f} to {high:.4f})",
    ]
    cells.append(f"{min(of_seeds):.4f} to {max(of_seeds):.4f}")
    if scratch:
        gain = [persons[person] - scratch[person] for person in persons]
        low, high = bootstrap(gain)
        cells.append(f"{statistics.fmean(gain):+.4f} ({low:+.4f} to {high:+.4f})")
    else:
        cells.append("")
    cells += [f"{of_label(label, 0):.4f}" for label in labels]
    cells += [f"{known_mean([of_label(label, 1) for label in labels]):.2f}"]
    epoch = statistics.median(fit["epoch_seconds"] for fit in fits)
    best = [fit["best_epoch"] for fit in fits]
    cells += [f"{epoch * statistics.fmean(best):.1f}", f"{epoch * len(fits[0]['history']):.1f}"]
    cells += ["/".join(map(str, best)), f"{fits[0]['trained']:,}"]
    cells += ["{:,.1f} / {:,.1f}".format(*(size / 1024 for size in fits[0]["bytes"]))]
    half = person_dice(tests, "half")
    cells.append(f"{statistics.fmean(persons[p] - half[p] for p in persons):+.5f}")
    return cells


def table(folder, names):
    """Print what is finished."""
    from methods_data import LABELS
    from methods_fits import read_lines

    finished = {}
    for index, name in enumerate(names):
        lines = read_lines(lines_of(folder, index))
        if any(line["kind"] == "test" for line in lines):
            finished[name] = lines
    scratch = finished.get(names[0])
    dice = person_dice([f for f in scratch if f["kind"] == "test"]) if scratch else None
    head = ["arm", "rate", "Dice (95 % interval)", "seeds", "minus scratch"]
    head += [label.split("_")[0] for label in LABELS]
    head += ["HD95 mm", "s to best", "s in all", "best epochs", "values"]
    head += ["KiB, float32 / float16", "lost by float16"]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, lines in finished.items():
        print("| " + " | ".join(row(name, lines, dice)) + " |")
    if missing := [name for name in names if name not in finished]:
        print(f"\nnot finished: {', '.join(missing)}")


def estimate(folder, arms, workers, walls):
    """Print how long the whole benchmark would take, after a quick one."""
    from methods_fits import read_lines

    quick = json.loads((folder / "design.json").read_text())
    base, training, validation, test = (
        whole / part for whole, part in zip(FULL["persons"], quick["persons"], strict=True)
    )
    fits = len(FULL["rates"]) + len(FULL["seeds"]) - 1
    total = 0.0
    for index, name in arms:
        lines = read_lines(lines_of(folder, index))
        tests = [line for line in lines if line["kind"] == "test"]
        if not tests:
            continue
        made = [line for line in lines if line["kind"] == "fit"]
        epoch, check, whole = (
            statistics.median(line[key] for line in made)
            for key in ("epoch_seconds", "validation_seconds", "seconds")
        )
        compiling = whole - quick["epochs"] * (epoch + check)
        epochs = FULL["epochs"] * (epoch * training + check * validation)
        tested = statistics.median(line["seconds"] for line in tests) * test
        seconds = fits * (epochs + compiling) + len(FULL["seeds"]) * tested
        begin = max(walls[name] - sum(line["seconds"] for line in lines), 0)
        print(f"{name}: {seconds:.0f} s, and {begin:.0f} s to begin")
        total += seconds + begin
    epochs = FULL["base_epochs"] / quick["base_epochs"]
    first = json.loads((folder / "base.json").read_text())["seconds"] * base * epochs
    slices = (walls[""] - first / base / epochs) * sum(FULL["persons"]) / sum(quick["persons"])
    print(
        f"estimate for the whole of these arms: at most {(first + slices) / 60:.0f} min for base "
        f"and slices, {total / workers / 60:.0f} min for the arms, {workers} at a time"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder; goes on if it is one")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true", help="few persons and epochs, no result")
    parser.add_argument("--only", nargs="+", help="arms whose names hold one of these words")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--epochs", type=int, help="passes over the training slices")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.run, options.child[0], int(options.child[1]))
        return
    data = options.data or Path(os.environ.get("DAFNE_FEDERATED_TEST_DATA", "."), "hippocampus")
    if not (data / "participants.csv").exists():
        print(f"skipped: no images in {str(data)!r}; give --data or DAFNE_FEDERATED_TEST_DATA")
        return
    from methods_data import Design
    from methods_fits import ARMS

    design = Design(
        data=str(data.resolve()), division=1, batch=8, nth=2, **(QUICK if options.quick else FULL)
    )
    changes = {"epochs": options.epochs, "rates": options.rates and tuple(options.rates)}
    design = dataclasses.replace(design, **{name: v for name, v in changes.items() if v})
    options.run.mkdir(parents=True, exist_ok=True)
    kept, text = options.run / "design.json", json.dumps(dataclasses.asdict(design), indent=1)
    if kept.exists() and kept.read_text() != text:
        sys.exit(f"{kept} holds another design; choose another --run")
    kept.write_text(text)
    print(f"command: python benchmarks/methods.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    print(f"design: {json.dumps(dataclasses.asdict(design) | {'data': data.name})}")
    print(
        f"{options.workers} arms at a time, one thread each; seconds are processor seconds of "
        "training, without validation\nDice: mean over persons of the mean over labels and seeds; "
        "interval: persons drawn anew; seeds: lowest and highest mean\n"
        "HD95: mean over persons, labels and seeds where something was found; s: means over seeds; "
        "lost by float16: Dice of the state less Dice of the state as it travels in float16",
        flush=True,
    )
    walls = {"": start(options.run, "", 0, "base and slices")}
    fit = json.loads((options.run / "base.json").read_text())
    print(f"base: validation Dice {fit['dice']:.3f} in epoch {fit['best_epoch']}", flush=True)
    names = list(ARMS)
    chosen = [
        (index, name)
        for index, name in enumerate(names)
        if not options.only or any(word in name for word in options.only)
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        for (_, name), seconds in zip(
            chosen,
            pool.map(lambda arm: start(options.run, arm[1], arm[0], arm[1]), chosen),
            strict=True,
        ):
            walls[name] = seconds
    table(options.run, names)
    if options.quick:
        estimate(options.run, chosen, options.workers, walls)


if __name__ == "__main__":
    main()
