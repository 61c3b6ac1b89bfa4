"""Combining updates: against the dense way, and time, memory and accuracy for a whole model.

Run: python benchmarks/aggregation.py [--repeats 5] [--seed 1] [--parts a b c d]

a  One 3x3 convolution, 512 to 1024 channels, 8 sites of rank 8: strategy 'product' against
   forming the mean update and taking its singular value decomposition. Both must give the same
   update to 1e-5 of its size; a difference ends the run with an error.
b  The adapter of Dafne's thigh network at rank 4, 50 sites, strategy 'product', in a process of
   its own: seconds, and the most memory that the process had.
c  The same adapter on disk from 10, 100 and 1,000 sites, strategy 'frozen-a', each in a process
   of its own: the most memory must not grow with the number of sites.
d  How far the result of each strategy is from the mean of products, for sites that agree more
   or less. They begin from one random factor, as in the first round.

Processor time of one thread of linear algebra, which is the same for a busy and an idle machine.
Memory is the largest resident set of the process, VmHWM of Linux.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is loaded

import numpy as np

from dafne_federated.core.low_rank import dense_product
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.stored_state import keep_arrays
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update

# Kernels of the thigh network (core/function_sources.py, thigh_spec): window, in, out; for the
# transposed ones window, out, in.
THIGH = (
    *("conv 1 1 32", "conv 3 32 32", "conv 3 32 32", "conv 2 32 64", "conv 3 64 64"),
    *("conv 3 64 64", "conv 2 64 128", "conv 3 128 128", "conv 3 128 128", "conv 2 128 256"),
    *("conv 3 256 256", "conv 3 256 256", "conv 2 256 512", "conv 3 512 512", "conv 3 512 512"),
    *("conv 3 512 1024", "conv-transpose 3 512 1024", "conv 3 1024 512", "conv 3 512 512"),
    *("conv-transpose 2 256 512", "conv 3 512 256", "conv 3 256 256"),
    *("conv-transpose 2 128 256", "conv 3 256 128", "conv 3 128 128"),
    *("conv-transpose 2 64 128", "conv 3 128 64", "conv 3 64 64"),
    *("conv-transpose 2 32 64", "conv 3 64 32", "conv 3 32 32"),
    *("delta 1 32 13",),
)
STRATEGIES_SHOWN = ("factors", "product", "stack")


def plan_of(kernels, rank, max_rank=256):
    targets = []
    for index, text in enumerate(kernels):
        kind, *numbers = text.split()
        window, *channels = map(int, numbers)
        shape = (window, window, *channels)
        targets.append(Target(key=f"{index:04d}", layer=text, kind=kind, shape=shape))
    return AdaptationPlan(
        base_digest="0" * 64,
        method="lora",
        rank=rank,
        max_rank=max_rank,
        scale=1,
        labels=("one",),
        targets=tuple(targets),
    )


def draw(plan, seed, site, apart=1.0, common_a=False):
    """Draw an update: a common random ``a`` plus ``apart`` times the site's own, and its ``b``."""
    common, own = np.random.default_rng(seed), np.random.default_rng([seed, site])
    state = {}
    for key, shape in plan.state_shapes().items():
        size = 1 / math.sqrt(math.prod(shape[:-1])) if key.endswith("/a") else 0.01
        shared, personal = (g.normal(0, size, shape).astype(np.float32) for g in (common, own))
        weight = 0.0 if common_a and key.endswith("/a") else np.float32(apart)
        state[key] = shared + weight * personal
    return state


def median(times):
    return f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})"


def timed(function, repeats):
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        result = function()
        times.append(time.process_time() - begun)
    return times, result


def peak_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    (text,) = (line for line in lines if line.startswith("VmHWM"))
    return int(text.split()[1]) * 1024 / 1e6


def against_dense(options):
    plan = plan_of(["conv 3 512 1024"], 8)
    updates = [Update(f"site {n}", draw(plan, options.seed, n), n + 1) for n in range(8)]
    total = sum(update.cases for update in updates)

    def dense():
        mean = 0.0
        for update in updates:
            pair = update.state["0000/a"], update.state["0000/b"]
            mean = mean + update.cases / total * dense_product(pair)
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        return (u[:, :8] * s[:8]) @ vt[:8]

    slow, want = timed(dense, options.repeats)
    fast, result = timed(lambda: STRATEGIES["product"](plan, updates), options.repeats)
    got = dense_product((result.state["0000/a"], result.state["0000/b"]))
    difference = np.linalg.norm(got - want) / np.linalg.norm(want)
    if difference > 1e-5:
        sys.exit(f"different results: {difference:.2g} of the update's size")
    print("| one layer 3x3 512 to 1024, 8 sites, rank 8 | s, median (range) |")
    print("|---|---|")
    print(f"| mean update, dense decomposition | {median(slow)} |")
    print(f"| product | {median(fast)} |")
    ratio = statistics.median(slow) / statistics.median(fast)
    print(f"{ratio:.0f} times faster; results differ by {difference:.1g} of their size\n")


def whole_model(options):
    plan = plan_of(THIGH, 4)
    updates = [Update(f"site {n:02d}", draw(plan, options.seed, n), n + 1) for n in range(50)]
    before = peak_mb()
    times, result = timed(lambda: STRATEGIES["product"](plan, updates), options.repeats)
    mib = sum(array.nbytes for array in result.state.values()) / 2**20
    print(f"| thigh adapter, rank 4, {mib:.2f} MiB, 50 sites | product |")
    print("|---|---|")
    print(f"| s, median (range) | {median(times)} |")
    print(f"| MB at most, of which before {before:.0f} | {peak_mb():.0f} |")
    print(flush=True)


def many_sites(options):
    plan = plan_of(THIGH, 4)
    with tempfile.TemporaryDirectory() as folder:
        updates = []
        for number in range(options.sites):
            state = draw(plan, options.seed, number, common_a=True)
            stored = keep_arrays(Path(folder, f"{number}.npz"), state)
            updates.append(Update(f"site {number:04d}", stored, 1))
        times, _ = timed(lambda: STRATEGIES["frozen-a"](plan, updates), 1)
    print(f"{times[0]:.2f} {peak_mb():.1f}")


def memory_by_sites(options):
    print("| sites, on disk, frozen-a | s | MB at most | of that for 10 |")
    print("|---|---|---|---|", flush=True)
    first = None
    for sites in options.many:
        seconds, most = map(float, child(options, "--one", "c", "--sites", str(sites)).split())
        first = first or most
        print(f"| {sites} | {seconds:.2f} | {most:.0f} | {most / first:.2f} |", flush=True)
    print()


def accuracy(options):
    print("| sites | rank | their factors a | " + " | ".join(STRATEGIES_SHOWN) + " |")
    print("|---|---|---|" + "---|" * len(STRATEGIES_SHOWN))
    for sites, rank in ((4, 4), (8, 4), (8, 8)):
        for apart, words in ((0.1, "0.1 apart"), (0.5, "0.5 apart"), (2.0, "2 apart")):
            plan = plan_of(["conv 3 64 64", "conv 3 128 128", "conv-transpose 2 64 128"], rank)
            cells = []
            for name in STRATEGIES_SHOWN:
                errors = []
                for repeat in range(options.repeats):
                    updates = [
                        Update(f"site {n}", draw(plan, options.seed + repeat, n, apart), n + 1)
                        for n in range(sites)
                    ]
                    errors.append(true_error(plan, updates, STRATEGIES[name](plan, updates).state))
                cells.append(median(errors))
            print(f"| {sites} | {rank} | {words} | " + " | ".join(cells) + " |")
    print("error: distance to the mean of products, as a share of its size, median (range)")
    print("over seeds, by dense arithmetic; stack had room for all directions\n")


def true_error(plan, updates, state):
    """Return the distance to the mean of products, by dense arithmetic, as a share of its size."""
    total, missed, size = sum(update.cases for update in updates), 0.0, 0.0
    for key in (target.key for target in plan.targets):
        pairs = [(u.cases / total, u.state[f"{key}/a"], u.state[f"{key}/b"]) for u in updates]
        mean = sum(weight * dense_product((a, b)) for weight, a, b in pairs)
        missed += np.sum((mean - dense_product((state[f"{key}/a"], state[f"{key}/b"]))) ** 2)
        size += np.sum(mean**2)
    return float(np.sqrt(missed / size))


def child(options, *arguments):
    """Run a part in a process of its own and return what it printed."""
    command = [sys.executable, __file__, *arguments]
    command += ["--repeats", str(options.repeats), "--seed", str(options.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["a", "b", "c", "d"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--many", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--sites", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        {"b": whole_model, "c": many_sites}[options.one](options)
        return
    print(f"command: python benchmarks/aggregation.py {' '.join(sys.argv[1:])}")
    print(f"Python {platform.python_version()}, numpy {version('numpy')}, ", end="")
    print(f"{len(os.sched_getaffinity(0))} cores, {options.repeats} repeats, seed {options.seed}\n")
    parts = {
        "a": against_dense,
        "b": lambda options: print(child(options, "--one", "b"), end=""),
        "c": memory_by_sites,
        "d": accuracy,
    }
    for name in options.parts:
        parts[name](options)


if __name__ == "__main__":
    main()
