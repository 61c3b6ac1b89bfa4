"""Folding a rank-4 adapter into a base and writing the `.model`, here and through Dafne.

Run: python benchmarks/folding.py [--layers all decoder] [--repeats 5] [--seed 1]

The base has the geometry of Dafne's thigh network (250 x 250, 26.6 M parameters) and random
weights. Through Dafne: its loader builds the network, the products are added to the weights,
``set_weights`` puts them in, ``dump`` writes the file. Here: read, fold, write, without the
network. In each repeat each side starts a process of its own, in turn, so that a busy machine
slows both. The whole process: from its start, with the imports, to the file. Again: the same
once more in that process, where all is imported and warm. Both files must hold the same weights:
the products are float32 in Dafne's way and float64 here, so that last bits may differ, no more.
Here the file is flushed to the disk before it gets its name, and its digest is taken; Dafne does
neither.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

RANK = 4
HERE, DAFNE = "here", "through Dafne"
PARTS = {
    HERE: ("read base", "read state", "fold", "write"),
    DAFNE: ("build network", "read state", "add products", "set_weights", "write"),
}
MEASURES = {
    "whole": "whole process, wall s",
    "wall": "again, wall s",
    "cpu": "again, processor s",
    "peak": "peak memory of the whole process, MiB",
}
PACKAGES = ("dafne-dl", "keras", "tensorflow", "numpy")


def make(folder, layers, seed):
    """Write the base, and for each choice of layers a state of random factors."""
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.backend import prepare_backend, set_seed
    from dafne_federated.core.function_sources import thigh_spec
    from dafne_federated.core.model_file import write_model
    from dafne_federated.core.model_runtime import RunningModel, build_model
    from dafne_federated.core.new_run import make_plan
    from dafne_federated.core.settings import RunSettings
    from dafne_federated.core.state import save_state

    prepare_backend(0, "cpu")
    set_seed(seed)
    built = build_model("benchmark", thigh_spec().sources(), 1, {"model_name": "Thigh"})
    base = write_model(built, folder / "base.model")
    approvals = Approvals(folder / "approved.json")
    approvals.add(base, "made by this benchmark")
    running = RunningModel(base, approvals)
    rng = np.random.default_rng(seed)
    for chosen in layers:
        plan = make_plan(running, RunSettings(rank=RANK, layers=chosen))
        state = {
            key: rng.normal(0, 0.02, shape).astype(np.float32)
            for key, shape in plan.state_shapes().items()
        }
        save_state(folder / f"{chosen}.npz", plan, state)


def fold_here(folder, chosen, output):
    """Yield after each of the parts."""
    from dafne_federated.core.model_file import read_model, write_model
    from dafne_federated.core.state import load_state
    from dafne_federated.server.release import adapted_model

    base = read_model(folder / "base.model")
    yield
    plan, state = load_state(folder / f"{chosen}.npz")
    yield
    model = adapted_model(base, plan, state, 2)
    yield
    write_model(model, output)
    yield


def fold_through_dafne(folder, chosen, output):
    """Yield after each of the parts."""
    from dafne_dl.model_loaders import generic_load_model

    with (folder / "base.model").open("rb") as file:
        model = generic_load_model(file, install_deps=False)
    yield
    with np.load(folder / f"{chosen}.npz") as archive:
        state = {name: archive[name] for name in archive.files}
    plan = json.loads(state.pop("plan").tobytes())
    yield
    weights = model.get_weights()
    for target in plan["targets"]:
        key, kind = target["key"], target["kind"]
        if kind == "delta":
            change = state[f"{key}/delta"]
        else:
            a, b = state[f"{key}/a"], state[f"{key}/b"]
            change = np.tensordot(a, b, 1) * np.float32(plan["scale"])
            if kind == "conv-transpose":  # (in, rows, columns, out) to (rows, columns, out, in)
                change = np.moveaxis(change, 0, -1)
        part = slice(*target["inputs"]) if target["inputs"] else slice(None)
        if kind == "conv-transpose":
            weights[int(key)][..., part] += change
        elif kind == "conv":
            weights[int(key)][..., part, :] += change
        else:
            weights[int(key)] += change
    yield
    model.set_weights(weights)
    yield
    with output.open("wb") as file:
        model.dump(file)
    yield


def memory_mib(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return float("nan")


def child(side, folder, chosen):
    """Fold twice; print what each time took."""
    import contextlib
    import io

    way = fold_here if side == HERE else fold_through_dafne
    for _ in range(2):
        used, times = time.process_time(), [time.perf_counter()]
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in way(folder, chosen, folder / f"{side}.model"):
                times.append(time.perf_counter())
        answer = {
            "parts": np.diff(times).tolist(),
            "wall": times[-1] - times[0],
            "cpu": time.process_time() - used,
            "peak": memory_mib("VmHWM"),
        }
        print(json.dumps(answer), flush=True)


def run(side, folder, chosen):
    """Return the figures of one process."""
    begun = time.perf_counter()
    arguments = ["--child", side, str(folder), chosen]
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    found = []
    for line in process.stdout:
        if line.startswith(b"{"):
            found.append(json.loads(line) | {"since": time.perf_counter() - begun})
    if process.wait() or len(found) != 2:
        sys.exit("a child process failed; run it by itself: " + " ".join(process.args))
    first, again = found
    return {
        "whole": first["since"],
        "wall": again["wall"],
        "cpu": again["cpu"],
        "parts": again["parts"],
        "peak": first["peak"],
    }


def check_equal(folder):
    """End the run unless both files hold the same weights; return the largest difference.

    The difference is in units in the last place of the largest weight of its array.
    """
    from dafne_federated.core.model_file import read_model

    base, here, theirs = (
        read_model(folder / f"{name}.model").weights for name in ("base", HERE, DAFNE)
    )
    changed, largest = 0, 0.0
    for key, one in here.items():
        if np.array_equal(base[key], one):
            if not np.array_equal(base[key], theirs[key]):
                sys.exit(f"weight {key} changed through Dafne alone")
            continue
        changed += 1
        unit = np.spacing(np.abs(one).max())
        largest = max(largest, float(np.abs(one - theirs[key]).max() / unit))
    if largest > 1 or here.keys() != theirs.keys():
        sys.exit(f"the files differ, by {largest:.1f} units in the last place")
    return f"{changed} of {len(here)} arrays changed, largest difference {largest:.2f} last places"


def cell(values, digits=2):
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(folder, chosen, repeats):
    runs = {DAFNE: [], HERE: []}
    for _ in range(repeats):
        for side, found in runs.items():
            found.append(run(side, folder, chosen))
    size = (folder / f"{chosen}.npz").stat().st_size / 1024
    print(f"\nlora rank {RANK}, layers {chosen}: a state of {size:,.0f} KiB")
    print("| measure | " + " | ".join([*runs, "ratio"]) + " |\n|---|---|---|---|")
    for key, name in MEASURES.items():
        sides = [[one[key] for one in found] for found in runs.values()]
        ratios = [one / other for one, other in zip(*sides, strict=True)]
        digits = 0 if "MiB" in name else 2
        print(
            f"| {name} | {cell(sides[0], digits)} | {cell(sides[1], digits)} | {cell(ratios, 1)} |"
        )
    for side, found in runs.items():
        parts = [
            f"{part} {statistics.median(one['parts'][i] for one in found):.2f}"
            for i, part in enumerate(PARTS[side])
        ]
        print(f"{side}, again, medians in s: {', '.join(parts)}")
    print(check_equal(folder), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", default=["all", "decoder"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers, options.seed)
        return
    if options.child:
        side, folder, chosen = options.child
        child(side, Path(folder), chosen)
        return
    print(f"command: python benchmarks/folding.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    print(f"seed {options.seed}, {options.repeats} repeats, {cores} cores, load {load}")
    print("median (range); ratios are medians over pairs of processes")
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--make", folder, "--seed", str(options.seed), "--layers", *options.layers]
        subprocess.run(
            [sys.executable, __file__, *arguments], check=True, stderr=subprocess.DEVNULL
        )
        for chosen in options.layers:
            compare(Path(folder), chosen, options.repeats)


if __name__ == "__main__":
    main()
