"""Five slices of the thigh network: Dafne's own ``incremental_learn`` against fine-tuning here.

Run: python benchmarks/finetune.py [--repeats 3] [--seed 1] [--dafne-models CHECKOUT]

Both sides get the same five 250 x 250 slices with 12 muscles and the same model, and train for
five epochs of one step. What is timed begins with the loaded model and the images, and ends with
new weights: preprocessing, tracing, training, and folding here. Each repeat is a new process with
nothing cached, as after a start of Dafne; the two sides take turns. With a checkout of Dafne's
model generators the model holds the functions of Dafne's own thigh model, else ours, which use
the same library functions on the same geometry. Weights are random: they do not change the time.
"""

import argparse
import ast
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from preprocessing import draw_case

SLICES = 5
EPOCHS = 5
SIDES = {
    "Dafne's incremental_learn": ("upstream", {}),
    "lora --layers decoder --rank 4": ("here", {"method": "lora", "layers": "decoder"}),
    "the same, --precision bfloat16": (
        "here",
        {"method": "lora", "layers": "decoder", "precision": "bfloat16"},
    ),
    "lora --rank 4": ("here", {"method": "lora"}),
    "head": ("here", {"method": "head"}),
}
PACKAGES = ("keras", "tensorflow", "numpy", "dafne-dl", "SimpleITK-SimpleElastix")


def dafnes_functions(checkout):
    """Return the functions of Dafne's own thigh model, by their key in a model file."""
    text = (checkout / "generate_thigh_split_model.py").read_text(encoding="utf-8")
    sources = {
        node.name: ast.unparse(node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }
    return {
        "init_model_function": sources["coscia_unet"],
        "apply_model_function": sources["coscia_apply"],
        "incremental_learn_function": sources["thigh_incremental_mem"],
    }


def make_model(path, checkout, seed):
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.backend import prepare_backend, set_seed
    from dafne_federated.core.function_sources import thigh_spec
    from dafne_federated.core.model_file import write_model
    from dafne_federated.core.model_runtime import build_model

    prepare_backend(0, "cpu")
    set_seed(seed)
    sources = dafnes_functions(checkout) if checkout else thigh_spec().sources()
    file = build_model("benchmark", sources, 1_700_000_000, {})
    Approvals().add(write_model(file, path), "made by a benchmark")


def child(options):
    """Train once and print what it took."""
    from dafne_federated.core.backend import prepare_backend, set_seed

    prepare_backend(options.threads, "cpu")
    way, settings = SIDES[options.child]
    set_seed(options.seed)
    begun = time.perf_counter()
    train = upstream(options) if way == "upstream" else here(options, settings)
    loaded, busy = time.perf_counter(), time.process_time()
    parts = train()
    seconds, busy = time.perf_counter() - loaded, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"load": loaded - begun, "all": seconds, "cpu": busy, "peak": peak, **parts}))


def labels_of(options):
    from dafne_federated.core.model_file import model_labels, read_model

    return [name for _, name in sorted(model_labels(read_model(options.model)).items())]


def upstream(options):
    from dafne_dl.model_loaders import generic_load_model

    with options.model.open("rb") as file:
        model = generic_load_model(file, install_deps=False)
    case = draw_case(labels_of(options), SLICES, options.seed)
    before = [weight.copy() for weight in model.model.get_weights()]

    def train():
        data = {
            "image_list": [case.image[..., index] for index in range(SLICES)],
            "resolution": np.array(case.spacing[:2]),
            "classification": "Thigh, Right",
        }
        masks = [
            {name: mask[..., index].astype(np.uint8) for name, mask in case.masks.items()}
            for index in range(SLICES)
        ]
        model.incremental_learn(data, masks, bs=SLICES, minTrainImages=1)
        after = model.model.get_weights()
        moved = sum(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        return {"moved": moved, "arrays": len(after)}

    return train


def here(options, settings):
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.fine_tuning import fine_tune, plan_fine_tuning
    from dafne_federated.core.fine_tuning_settings import FineTuningSettings
    from dafne_federated.core.model_file import read_model
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.state import fold

    model = RunningModel(read_model(options.model), Approvals())
    case = draw_case(list(model.labels), SLICES, options.seed)

    def train():
        begun = time.perf_counter()
        slices = model.prepare_all(iter([case]), "Thigh, Right")
        prepared = time.perf_counter() - begun
        wanted = FineTuningSettings(
            epochs=EPOCHS, batch_size=SLICES, rank=4, seed=options.seed, **settings
        )
        tuning = plan_fine_tuning(model, wanted)
        found = fine_tune(tuning, slices)
        weights = fold(model.file.weights, tuning.plan, found.state)
        moved = sum(not np.array_equal(weights[k], v) for k, v in model.file.weights.items())
        return {"moved": moved, "arrays": len(weights), "prepare": prepared}

    return train


def run(options, name, folder):
    command = [sys.executable, __file__, "--child", name, "--model", str(folder / "base.model")]
    command += ["--seed", str(options.seed), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith('{"load"'):
            return json.loads(line)
    sys.exit(f"{name}: no result\n{done.stderr[-2000:]}")


def cell(values, digits=1):
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dafne-models", type=Path, help="checkout of Dafne's model generators")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    print(f"command: python benchmarks/finetune.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"seed {options.seed}, {options.repeats} repeats, {options.threads} threads, load {load}")
    whose = "Dafne's own thigh functions" if options.dafne_models else "our functions"
    print(f"{whose}, {SLICES} slices of 250 x 250, {EPOCHS} epochs; median (range)")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DAFNE_FEDERATED_HOME"] = str(Path(folder) / "home")
        make_model(Path(folder) / "base.model", options.dafne_models, options.seed)
        found = {name: [] for name in SIDES}
        for _ in range(options.repeats):
            for name in SIDES:
                found[name].append(run(options, name, Path(folder)))
    print(
        "| side | wall s | times faster | processor s | times less | preprocessing, wall s "
        "| loading before, wall s | peak MiB |\n|---|---|---|---|---|---|---|---|"
    )
    first = next(iter(found.values()))
    for name, rows in found.items():
        cells = []
        for key in ("all", "cpu"):
            ratios = [one[key] / other[key] for one, other in zip(first, rows, strict=True)]
            cells += [cell([row[key] for row in rows]), f"{statistics.median(ratios):.1f}"]
        prepare = [row["prepare"] for row in rows if "prepare" in row]
        cells += [cell(prepare) if prepare else "", cell([row["load"] for row in rows])]
        cells.append(f"{max(row['peak'] for row in rows):.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |")
        assert all(row["moved"] for row in rows), f"{name} changed nothing"


if __name__ == "__main__":
    main()
