"""A model that Dafne retrained, adopted as adapters: what each rank keeps, and its Dice.

Run: python benchmarks/adopt.py --keep DIR [--data FOLDER] [--seeds 1 2 3] [--dafne-models CHECKOUT]

For each seed, persons of the hippocampus set (``--data``, else ``hippocampus`` in the folder that
the variable DAFNE_FEDERATED_TEST_DATA names) are divided: some train a base, others retrain it,
the rest test. Retraining is Dafne's own: ``dafne_dl`` loads the base and calls its
``incremental_learn`` for one person after the other with the batch size and the least number of
slices that the desktop program uses, and dumps the result. That whole model is then adopted
into several plans, and every arm is applied to the test persons in the geometry of their images.

The base has our functions, which hold the statistics of normalisations still; with a checkout of
Dafne's model generators it has those of Dafne's own trainer, which train them. Everything is kept
in ``--keep``; what is finished there is not done again.
"""

import argparse
import ast
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

PACKAGES = ("keras", "tensorflow", "numpy", "dafne-dl", "SimpleITK-SimpleElastix")
TEMPLATE = "src/dafne_models/resources/generate_model.py.tmpl"
FUNCTIONS = ("init_model_function", "apply_model_function", "incremental_learn_function")
SIZE = 56  # pixels of 1 mm; the largest image has 58 rows
BATCH, LEAST = 5, 5  # what the desktop program passes to incremental_learn
FULL = {"persons": (12, 8, 24), "epochs": 30, "filters": (16, 32, 64, 128), "levels": 3}
TINY = {"persons": (3, 2, 2), "epochs": 2, "filters": (4, 8), "levels": 2}
STAGES = ("base", "upload", "test")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A plan that the retrained model is adopted into."""

    method: str
    rank: int = 4
    statistics: str = "base"

    @property
    def name(self):
        rank = "" if self.method == "full" else f", rank {self.rank}"
        return self.method + rank + (", statistics" if self.statistics == "pooled" else "")


HIGHEST = 256  # more than any kernel here has
ARMS = (
    *(Arm("lora", rank) for rank in (1, 4, 16, HIGHEST)),
    *(Arm("lora+norm", rank, "pooled") for rank in (4, 16)),
    Arm("full"),
    Arm("full", statistics="pooled"),
)


def child(folder, stage):
    import warnings

    warnings.simplefilter("ignore")
    from dafne_federated.core.backend import prepare_backend

    prepare_backend(1, "cpu")
    os.environ["DAFNE_FEDERATED_HOME"] = str(folder / "home")
    design = json.loads((folder.parent / "design.json").read_text())
    seed = int(folder.name.removeprefix("seed-"))
    {"base": make_base, "upload": retrain, "test": measure}[stage](folder, design, seed)


def cases_of(design, seed, part):
    """Return the cases of one part; every person is one case."""
    from dafne_federated.core.dataset import load_case, open_folder

    data = open_folder(Path(design["data"]))
    order = np.random.default_rng(seed).permutation(len(data.cases))
    ends = np.cumsum((0, *design["persons"]))
    first, end = ends[part], ends[part + 1]
    return [load_case(data.cases[i], data.labels) for i in order[first:end]], data.labels


def make_base(folder, design, seed):
    """Train a new model on the first part; one person in six chooses the epoch."""
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.backend import set_seed
    from dafne_federated.core.base_training import propose_spec
    from dafne_federated.core.model_file import keras_weights, write_model
    from dafne_federated.core.model_runtime import RunningModel, build_model
    from dafne_federated.core.training import train_network

    cases, labels = cases_of(design, seed, 0)
    if design["checkout"]:
        sources = trainers_functions(Path(design["checkout"]), labels, design["levels"])
    else:
        filters = tuple(design["filters"])
        strides = (2,) * (len(filters) - 1)
        spec = propose_spec(cases, list(labels.values()), SIZE, 1.0, filters, strides)
        # Over a crop of 50 mm the bias field is nearly flat; one level takes a tenth of the time.
        sources = spec.model_copy(update={"bias_levels": 1}).sources()
    set_seed(seed, "network")
    file = build_model("benchmark", sources, 1_700_000_000, {"model_name": "Hippocampus"})
    approvals = Approvals(folder / "approved.json")
    untrained = write_model(file, folder / "untrained.model")
    approvals.add(untrained, "built by this benchmark")
    model = RunningModel(untrained, approvals)
    held_out = max(len(cases) // 6, 1)
    slices, validation = (
        model.prepare_all(iter(part), cache=bias_fields(folder))
        for part in (cases[held_out:], cases[:held_out])
    )
    epochs = design["epochs"]
    fit = train_network(
        model.network, model.loss, slices, validation, epochs, epochs, 8, 2e-3, seed
    )
    trained = dataclasses.replace(file, weights=keras_weights(model.network.get_weights()))
    approvals.add(write_model(trained, folder / "base.model"), "trained by this benchmark")
    (folder / "fit.json").write_text(json.dumps({"dice": fit.best_dice, "epoch": fit.best_epoch}))


def trainers_functions(checkout, labels, levels):
    """Return the functions of Dafne's own trainer, its constants filled in."""
    text = (checkout / TEMPLATE).read_text(encoding="utf-8")
    constants = {
        "LABELS_DICT": labels,
        "MODEL_SIZE": [SIZE, SIZE],
        "MODEL_RESOLUTION": [1.0, 1.0],
        "N_LEVELS": levels,
        "N_CONV_LAYERS": 2,
        "INITIAL_KERNEL_SIZE": 2,
        "BIASCORRECTION_LEVELS": 1,
        "BIASCORRECTION_NORMALIZE": -1,
        "MODEL_NAME": "Hippocampus",
        "MODEL_UID": "benchmark",
    }
    for name, value in constants.items():
        text = text.replace(f"%%{name}%%", repr(value))
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return dict(zip(FUNCTIONS, map(ast.unparse, functions), strict=True))


def retrain(folder, design, seed):
    """Do what the desktop program does after each person: learn, and keep the whole model."""
    from dafne_dl.model_loaders import generic_load_model

    from dafne_federated.core.backend import set_seed

    with (folder / "base.model").open("rb") as file:
        model = generic_load_model(file, install_deps=False)
    set_seed(seed, "retraining")
    for case in cases_of(design, seed, 1)[0]:
        count = case.image.shape[-1]
        data = {
            "image_list": [case.image[..., i] for i in range(count) if np.ptp(case.image[..., i])],
            "resolution": np.array(case.spacing[:2]),
            "classification": "Hippocampus",
        }
        masks = [
            {name: mask[..., i].astype(np.uint8) for name, mask in case.masks.items()}
            for i in range(count)
            if np.ptp(case.image[..., i])
        ]
        model.incremental_learn(data, masks, bs=BATCH, minTrainImages=LEAST)
    model.reset_timestamp()
    with (folder / "unfinished.model").open("wb") as file:
        model.dump(file)
    (folder / "unfinished.model").replace(folder / "upload.model")


def measure(folder, design, seed):
    """Adopt the upload into every plan, and test base, upload and all that was adopted."""
    from dafne_federated.core.adopted_state import adopt
    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.model_file import read_model
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.new_run import make_plan
    from dafne_federated.core.settings import RunSettings
    from dafne_federated.core.state import fold

    base, upload = (read_model(folder / f"{name}.model") for name in ("base", "upload"))
    model = RunningModel(base, Approvals(folder / "approved.json"))
    found = {"base": {}, "upload": {}}
    weights = {"base": base.weights, "upload": upload.weights}
    for arm in ARMS:
        settings = RunSettings(
            method=arm.method, rank=arm.rank, max_rank=HIGHEST, statistics=arm.statistics
        )
        plan = make_plan(model, settings)
        adopted = adopt(base, upload, plan)
        weights[arm.name] = fold(base.weights, plan, adopted.state)
        kib = sum(array.nbytes for array in adopted.state.values()) / 1024
        found[arm.name] = {"share": adopted.share, "whole": adopted.whole, "kib": kib}
    for name, arrays in weights.items():
        found[name]["dice"] = test_dice(folder, model, arrays, design, seed)
    found["upload"]["kib"] = sum(array.nbytes for array in upload.weights.values()) / 1024
    found["base"]["moved"] = float(
        np.sqrt(sum(np.sum((upload.weights[k] - v) ** 2.0) for k, v in base.weights.items()))
        / np.sqrt(sum(np.sum(v**2.0) for v in base.weights.values()))
    )
    (folder / "unfinished.json").write_text(json.dumps(found))
    (folder / "unfinished.json").replace(folder / "found.json")


def test_dice(folder, model, weights, design, seed):
    """Return the mean Dice of each test person."""
    from dafne_federated.core.evaluation import evaluate_case
    from dafne_federated.core.metrics import mean_dice

    model.network.set_weights([weights[key] for key in sorted(weights)])
    cache = bias_fields(folder)
    return [
        mean_dice(evaluate_case(model, case, cache=cache, distances=False))
        for case in cases_of(design, seed, 2)[0]
    ]


def bias_fields(folder):
    from dafne_federated.core.preprocessing import BiasFieldCache

    return BiasFieldCache(folder.parent / "bias-fields")


def finished(folder, stage):
    return (
        folder / {"base": "fit.json", "upload": "upload.model", "test": "found.json"}[stage]
    ).exists()


def start(folder, stage):
    """Run one stage in a process of its own, unless it is done."""
    if finished(folder, stage):
        return
    folder.mkdir(exist_ok=True)
    begun = time.perf_counter()
    command = [
        sys.executable,
        __file__,
        "--keep",
        str(folder.parent),
        "--child",
        folder.name,
        stage,
    ]
    with (folder / "log.txt").open("ab") as log:
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if status:
        sys.exit(f"{folder.name}, {stage}: ended with status {status}, see {folder / 'log.txt'}")
    seconds = time.perf_counter() - begun
    print(f"{folder.name}, {stage}: {seconds:.0f} s", file=sys.stderr, flush=True)


def spread(values, shown="{:.3f}"):
    """Return the mean over seeds and, of several, their range."""
    text = shown.format(statistics.fmean(values))
    if len(values) > 1:
        text += f" ({shown.format(min(values))} to {shown.format(max(values))})"
    return text


def table(folders):
    found = [json.loads((folder / "found.json").read_text()) for folder in folders]
    moved = spread([100 * one["base"]["moved"] for one in found], "{:.1f}")
    fits = [json.loads((folder / "fit.json").read_text()) for folder in folders]
    print(f"base: validation Dice {spread([fit['dice'] for fit in fits])}")
    print(f"retraining moved the weights by {moved} % of their norm")
    head = ("arm", "share of the change, %", "of all weights, %", "KiB, float32", "Dice")
    print("| " + " | ".join((*head, "minus base", "minus upload")) + " |")
    print("|---|---|---|---|---|---|---|")
    for name in found[0]:
        means = [statistics.fmean(one[name]["dice"]) for one in found]
        differences = [
            spread(
                [
                    m - statistics.fmean(one[other]["dice"])
                    for m, one in zip(means, found, strict=True)
                ],
                "{:+.3f}",
            )
            if other != name
            else ""
            for other in ("base", "upload")
        ]
        shares = [
            spread([100 * one[name][key] for one in found], "{:.1f}")
            if key in found[0][name]
            else ""
            for key in ("share", "whole")
        ]
        cells = [
            name.replace(f"rank {HIGHEST}", "every rank"),
            *shares,
            f"{found[0][name]['kib']:,.0f}" if "kib" in found[0][name] else "",
            spread(means),
            *differences,
        ]
        print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--data", type=Path, help="folder of images")
    parser.add_argument("--persons", type=int, nargs=3, help="for base, retraining and test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dafne-models", type=Path, help="checkout of Dafne's model generators")
    parser.add_argument("--tiny", action="store_true", help="a network of nothing, no result")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep = options.keep.resolve()
    if options.child:
        child(keep / options.child[0], options.child[1])
        return
    data = options.data or Path(os.environ.get("DAFNE_FEDERATED_TEST_DATA", "."), "hippocampus")
    if not (data / "participants.csv").exists():
        print(f"skipped: no images in {str(data)!r}; give --data or DAFNE_FEDERATED_TEST_DATA")
        return
    checkout = str(options.dafne_models.resolve()) if options.dafne_models else ""
    design = (TINY if options.tiny else FULL) | {"data": str(data.resolve()), "checkout": checkout}
    if options.persons:
        design["persons"] = options.persons
    keep.mkdir(parents=True, exist_ok=True)
    kept, text = keep / "design.json", json.dumps(design, indent=1)
    if kept.exists() and kept.read_text() != text:
        sys.exit(f"{kept} holds another design; choose another --keep")
    kept.write_text(text)
    print(f"command: python benchmarks/adopt.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    whose = "Dafne's own trainer" if checkout else "ours"
    train, learn, test = design["persons"]
    print(f"functions: {whose}; persons: {train} for the base, {learn} to retrain, {test} to test")
    print(f"seeds {options.seeds}; mean over seeds (lowest to highest)", flush=True)
    folders = [keep / f"seed-{seed}" for seed in options.seeds]
    for folder in folders:
        for stage in STAGES:
            start(folder, stage)
    table(folders)


if __name__ == "__main__":
    main()
