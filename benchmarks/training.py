"""One training step of every kind against full fine-tuning as Dafne does it.

Run: python benchmarks/training.py [--networks thigh small] [--repeats 5] [--precision bfloat16]

Each kind runs in a process of its own, which steps in turn with one of full fine-tuning, so
that a busy machine slows both; a ratio is the median over these pairs of steps. Random slices
and weights: time and memory depend on shapes alone. Memory is the high-water mark of resident
memory, pages mapped from the cache included, above what the process had with the network built.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

BATCH = 4
RANK = 4
FILLED = 8  # slices that the cache is filled with to take the time
FULL = "full fine-tuning, as Dafne does it"
# What is compared: how it runs, the method, and which layers ``lora`` takes.
KINDS = {
    FULL: ("full", "", ""),
    "full fine-tuning, batch norm frozen": ("full-frozen", "", ""),
    "full, as a method here": ("folded", "full", "all"),
    "encoder": ("folded", "encoder", "all"),
    "decoder, cached": ("cached", "decoder", "all"),
    "last-k 2, cached": ("cached", "last-k", "all"),
    "norm": ("plain", "norm", "all"),
    "bias": ("folded", "bias", "all"),
    "ssf": ("plain", "ssf", "all"),
    "lora + norm": ("plain", "lora+norm", "all"),
    "lora, all layers": ("folded", "lora", "all"),
    "lora, all layers, batch norm not folded": ("plain", "lora", "all"),
    "lora, decoder, not cached": ("folded", "lora", "decoder"),
    "lora, decoder, skips trained too, cached": ("cached-skips", "lora", "decoder"),
    "lora, decoder, cached": ("cached", "lora", "decoder"),
    "head, not cached": ("folded", "head", "all"),
    "head, cached": ("cached", "head", "all"),
    "forward pass alone": ("forward", "", ""),
}
FILL = "filling the cache, lora, decoder, one slice"
PACKAGES = ("keras", "tensorflow", "numpy", "dafne-dl")


def spec_of(name):
    from dafne_federated.core.function_sources import NetworkSpec, thigh_spec

    if name == "thigh":
        return thigh_spec()
    return NetworkSpec(labels=("a", "b"), size=64, resolution=(1.0, 1.0))


def build(spec):
    """Build a network, and give its normalisations statistics that differ from the first ones."""
    import keras

    scope = {}
    exec(spec.sources()["init_model_function"], scope)
    network = scope["init_model"]()
    rng = np.random.default_rng(0)
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(0, 0.1, layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, layer.moving_variance.shape))
    return network


def draw_slices(spec, count, seed):
    from dafne_federated.core.slices import PreparedSlices

    rng = np.random.default_rng(seed)
    shape = (count, spec.size, spec.size)
    channels = len(spec.labels) + 1
    return PreparedSlices(
        images=rng.normal(100, 20, shape).astype(np.float32),
        labels=rng.integers(0, channels, shape, np.uint8),
        weights=rng.uniform(0.5, 2, shape).astype(np.float32),
        channels=channels,
    )


def plan_of(network, spec, method, where, skips):
    from dafne_federated.core.methods import Choices, plan_targets
    from dafne_federated.core.network_layers import describe_layers
    from dafne_federated.core.plan import AdaptationPlan
    from dafne_federated.core.suffix_network import without_skips

    targets = plan_targets(method, describe_layers(network), Choices(where=where))
    return AdaptationPlan(
        base_digest="0" * 64,
        method=method,
        rank=RANK,
        max_rank=RANK,
        scale=1.0,
        labels=spec.labels,
        targets=targets if skips else without_skips(network, targets),
    )


def dafnes_training(network, frozen):
    """Compile as ``thigh_incremental_mem`` of dafne-models does."""
    import keras
    from dafne_dl.common.preprocess_train import weighted_loss

    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = not frozen
    adam = keras.optimizers.Adam(
        learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-08, amsgrad=True
    )
    network.compile(loss=weighted_loss, optimizer=adam)
    return network


def prepare(network, spec, way, method, where, slices, folder, precision):
    """Return a function that makes one step, and the bytes that travel."""
    from dafne_dl.common.preprocess_train import weighted_loss

    from dafne_federated.core.adapters import AdaptedNetwork
    from dafne_federated.core.prefix_cache import PrefixCache
    from dafne_federated.core.state import initial_state
    from dafne_federated.core.suffix_network import SuffixNetwork
    from dafne_federated.core.training import AdapterTraining, train_epoch

    rng = np.random.default_rng(0)
    if way == "forward":
        inputs, _ = slices.batch(np.arange(len(slices)))
        return lambda: network.predict_on_batch(inputs), 0
    if way.startswith("full"):
        dafnes_training(network, way == "full-frozen")
        return lambda: train_epoch(network, slices, BATCH, rng), 4 * network.count_params()
    plan = plan_of(network, spec, method, where, skips=way == "cached-skips")
    adapted = AdaptedNetwork(network, plan)
    adapted.write(initial_state(plan, 0))
    cut = adapted if way == "plain" else SuffixNetwork(adapted, way != "folded", precision)
    if way == "fill":
        cut.features(slices.batch(np.arange(BATCH))[0])
        return lambda: PrefixCache(folder / str(time.time_ns()), 1e6).slices(cut, slices), 0
    cached = way.startswith("cached")
    batches = PrefixCache(folder, 1e6).slices(cut, slices) if cached else slices
    AdapterTraining(cut, weighted_loss)  # compiles it
    return lambda: train_epoch(cut.trained, batches, BATCH, rng), plan.wire_bytes


def memory_mib(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return float("nan")


def child(options):
    """Build one kind, then make a step for each line that comes in."""
    import warnings

    warnings.simplefilter("ignore")
    from dafne_federated.core.backend import prepare_backend, set_seed

    prepare_backend(options.threads, "cpu")
    # Libraries take memory, too; they are all there before what is measured.
    from dafne_dl.common import preprocess_train  # noqa: F401

    import dafne_federated.core.suffix_training  # noqa: F401

    set_seed(options.seed)
    spec = spec_of(options.networks[0])
    network = build(spec)
    slices = draw_slices(spec, options.slices, options.seed)
    start = memory_mib("VmRSS")
    kind, precision = options.child, options.precision
    step, size = prepare(network, spec, *kind, slices, options.folder, precision)
    begun = time.perf_counter()
    step()
    print(json.dumps({"first": time.perf_counter() - begun, "bytes": size}), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        step()
        made = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - processor}
        print(json.dumps({**made, "peak": memory_mib("VmHWM") - start}), flush=True)


@dataclass
class Process:
    """A child process with one kind of step."""

    process: subprocess.Popen
    started: dict

    @classmethod
    def start(cls, options, network, kind, folder, slices=BATCH):
        command = [sys.executable, __file__, "--child", *kind, "--networks", network]
        command += ["--seed", str(options.seed), "--threads", str(options.threads)]
        command += ["--folder", str(folder), "--slices", str(slices)]
        command += ["--precision", options.precision]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return cls(process, cls._answer(process))

    @staticmethod
    def _answer(process):
        for line in process.stdout:
            if line.startswith(b"{"):
                return json.loads(line)
        sys.exit("a child process ended; run it by itself to see why: " + " ".join(process.args))

    def step(self):
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self._answer(self.process)

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def cell(values, digits=3):
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(name, started, steps, pairs, full_peak):
    """Print the figures of one kind."""
    wall, cpu = ([step[key] for step in steps] for key in ("wall", "cpu"))
    ratios = [
        statistics.median(one[key] / other[key] for one, other in pairs) for key in ("wall", "cpu")
    ]
    peak = max(step["peak"] for step in steps)
    size = started["bytes"]
    sizes = f"{size / 1024:,.1f} / {size / 2048:,.1f}" if size else ""
    cells = [cell(cpu), f"{ratios[1]:.3f}", cell(wall), f"{ratios[0]:.3f}"]
    cells += [f"{peak:.0f}", f"{peak / full_peak:.2f}", f"{started['first']:.1f}", sizes]
    print("| " + " | ".join([name, *cells]) + " |", flush=True)


def table(options, network, folder):
    spec = spec_of(network)
    print(f"\n{network}: {spec.size} x {spec.size}, batch {BATCH}, rank {RANK}")
    print(
        "| step | processor s | ratio | wall s | ratio | peak MiB | ratio | first step s "
        "| KiB each way, float32 / float16 |\n|---|---|---|---|---|---|---|---|---|"
    )
    full = Process.start(options, network, KINDS[FULL], folder)
    rows = {name: kind for name, kind in KINDS.items() if name != FULL}
    rows[FILL] = ("fill", "lora", "decoder")
    all_full, found = [full.step()], {}
    for name, kind in rows.items():
        way = kind[0]
        if options.only and not any(word in name for word in options.only):
            continue
        if way.startswith("cached"):  # filled by another process: training alone is measured
            Process.start(options, network, kind, folder).end()
        slices = FILLED if way == "fill" else BATCH
        other = Process.start(options, network, kind, folder, slices)
        pairs = [(other.step(), full.step()) for _ in range(options.repeats)]
        other.end()
        all_full += [one for _, one in pairs]
        found[name] = other.started, pairs, slices if way == "fill" else 1
    full.end()
    peak = max(step["peak"] for step in all_full)
    row(FULL, full.started, all_full, [(one, one) for one in all_full], peak)
    for name, (started, pairs, parts) in found.items():
        for one, _ in pairs:
            one.update({key: one[key] / parts for key in ("wall", "cpu")})
        row(name, started, [one for one, _ in pairs], pairs, peak)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["thigh", "small"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these words")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the rows with folded normalisations and with a cache",
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slices", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    print(f"command: python benchmarks/training.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"seed {options.seed}, {options.repeats} repeats, {options.threads} threads, load {load}")
    print(
        "seconds: median (range); ratios to full fine-tuning, medians over pairs of steps; an "
        f"epoch of n slices is n / {BATCH} such steps"
    )
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            table(options, network, Path(folder) / network)


if __name__ == "__main__":
    main()
