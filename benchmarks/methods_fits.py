"""The arms of `methods.py`: fitting one, choosing its learning rate, and testing it.

A finished fit or test is one line of JSON, so a run that was stopped goes on where it was.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from methods_data import Shared

from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.backend import set_seed
from dafne_federated.core.evaluation import evaluate_case
from dafne_federated.core.methods import Choices, plan_targets
from dafne_federated.core.network_layers import describe_layers
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.state import initial_state
from dafne_federated.core.suffix_network import SuffixNetwork, without_skips
from dafne_federated.core.training import AdapterTraining, slice_dice, train_network
from dafne_federated.core.wire import record_bytes
from dafne_federated.core.wire_arrays import rounded, state_record

SCALE = 1.0
TOGETHER = 32  # slices in a forward pass


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        method: As in the table of methods, or empty: all weights and batch statistics.
        where: For low-rank pairs: which kernels.
        rank: Of low-rank pairs.
        skips: Whether pairs cover the channels of frozen skip connections, too.
        random: Whether to start from random weights instead of the base.
    """

    method: str = ""
    where: str = "all"
    rank: int = 4
    skips: bool = False
    random: bool = False


# The slowest first, so that the last minutes of a run keep all workers busy. Methods that leave
# the head as it is are joined with the head: here its labels are new.
ARMS = {
    "scratch, all weights": Arm(random=True),
    "full fine-tuning, batch norm trained": Arm(),
    "full, batch norm frozen": Arm("full"),
    "encoder + head": Arm("encoder+head"),
    "bias + head": Arm("bias+head"),
    "norm + head": Arm("norm+head"),
    "ssf": Arm("ssf"),
    "lora r4 + norm": Arm("lora+norm"),
    "lora r4, all": Arm("lora"),
    "decoder": Arm("decoder"),
    "lora r4, decoder, skips too": Arm("lora", "decoder", skips=True),
    "lora r16, decoder": Arm("lora", "decoder", 16),
    "lora r4, decoder": Arm("lora", "decoder"),
    "lora r1, decoder": Arm("lora", "decoder", 1),
    "last 2 layers": Arm("last-k"),
    "head": Arm("head"),
}


class Replay:
    """Stands in for a network whose outputs are known, in the order of its calls."""

    def __init__(self, outputs):
        self._outputs = iter(outputs)

    def __call__(self, _inputs):
        return next(self._outputs)


class AdapterFits:
    """Fits of one adaptation method; compiled once."""

    def __init__(self, shared, arm, folder):
        self.design = shared.design
        self.model = shared.model()
        network = self.model.network
        choices = Choices(where=arm.where)
        targets = plan_targets(arm.method, describe_layers(network), choices)
        self.plan = AdaptationPlan(
            base_digest=self.model.file.digest,
            method=arm.method,
            rank=arm.rank,
            max_rank=arm.rank,
            scale=SCALE,
            labels=self.model.labels,
            targets=targets if arm.skips else without_skips(network, targets),
        )
        self.adapted = AdaptedNetwork(network, self.plan)
        self.model.prepare(next(shared.cases("training")), cache=shared.bias_fields)  # its loss
        cut = SuffixNetwork(self.adapted)
        cache = PrefixCache(folder, 1e6)
        training, self.truth = shared.slices("training"), shared.slices("validation")
        self.slices, self.held_out = (
            cache.slices(cut, part) if cut.saved else part for part in (training, self.truth)
        )
        self.suffix = cut.trained
        self.training = AdapterTraining(cut, self.model.loss)
        self.trained = self.plan.parameters
        self._warm_up()

    def _warm_up(self):
        """Compile, so that no fit is slower than the others."""
        self.adapted.write(initial_state(self.plan, 0))
        self.training.run(self.slices, 1, self.design.batch, 1e-3, 0)

    def fit(self, rate, seed):
        self.adapted.write(initial_state(self.plan, seed))
        history, seconds, others, best = [], [], [], (-1.0, None)
        begun = time.process_time()

        def measure(_epoch, _loss):
            nonlocal best, begun
            seconds.append(time.process_time() - begun)
            outputs = forward(self.suffix, self.held_out)
            history.append(slice_dice(Replay(outputs), self.truth, TOGETHER))
            if history[-1] > best[0]:
                best = history[-1], self.adapted.read()
            now = time.process_time()
            others.append(now - begun - seconds[-1])
            begun = now

        self.training.run(self.slices, self.design.epochs, self.design.batch, rate, seed, measure)
        return best[1], history, float(np.median(seconds)), float(np.median(others))

    def outputs(self, state, inputs):
        self.adapted.write(state)
        return in_batches(self.adapted.predict, inputs)


class NetworkFits:
    """Fits of all weights of a network, batch statistics among them."""

    def __init__(self, shared, arm, _folder):
        self.design, self.random = shared.design, arm.random
        self.model = shared.model()
        self.model.prepare(next(shared.cases("training")), cache=shared.bias_fields)  # its loss
        self.slices, self.truth = shared.slices("training"), shared.slices("validation")
        self.start = self.model.network.get_weights()
        self.trained = int(sum(np.prod(v.shape) for v in self.model.network.trainable_variables))

    def fit(self, rate, seed):
        set_seed(seed, "methods")
        if self.random:
            scope = {}
            exec(self.model.file.functions["init_model_function"], scope)
            network = scope["init_model"]()
            self.model.network.set_weights(network.get_weights())
        else:
            self.model.network.set_weights(self.start)
        seconds, begun = [], time.process_time()

        def measure(*_figures):
            nonlocal begun
            seconds.append(time.process_time() - begun)
            begun = time.process_time()

        epochs, batch, network = self.design.epochs, self.design.batch, self.model.network
        fit = train_network(
            network, self.model.loss, self.slices, self.truth, epochs, epochs, batch, rate, seed,
            measure,
        )  # fmt: skip
        begun = time.process_time()
        slice_dice(network.predict_on_batch, self.truth)
        validation = time.process_time() - begun
        state = {f"{i:04d}": array for i, array in enumerate(network.get_weights())}
        history = [dice for _, dice in fit.history]
        return state, history, max(float(np.median(seconds)) - validation, 0.0), validation

    def outputs(self, state, inputs):
        self.model.network.set_weights([state[key] for key in sorted(state)])
        return in_batches(self.model.network.predict_on_batch, inputs)


def run_arm(shared: Shared, name: str, file: Path):
    """Fit an arm at each rate, choose by validation, fit the other seeds, then test.

    One line of JSON a finished fit or test; what ``file`` holds already is not done again.
    """
    with tempfile.TemporaryDirectory() as folder:
        arm = ARMS[name]
        fits = (AdapterFits if arm.method else NetworkFits)(shared, arm, Path(folder))
        states = shared.folder / "states"
        states.mkdir(exist_ok=True)
        design = shared.design
        first, *others = design.seeds
        for rate in design.rates:
            _fit(fits, name, rate, first, file, states)
        rate = chosen_rate(read_lines(file))
        for seed in others:
            _fit(fits, name, rate, seed, file, states)
        for seed in design.seeds:
            if not any(
                line["kind"] == "test" and line["seed"] == seed for line in read_lines(file)
            ):
                with np.load(_state(states, name, rate, seed)) as arrays:
                    _test(shared, fits, name, rate, seed, dict(arrays), file)


def chosen_rate(lines):
    """Return the rate with the best validation Dice of the first seed; the smallest of equals."""
    fits = [line for line in lines if line["kind"] == "fit"]
    seed = fits[0]["seed"]
    best = max((f for f in fits if f["seed"] == seed), key=lambda f: (f["dice"], -f["rate"]))
    return best["rate"]


def read_lines(file):
    """Return the finished cells; half a line that a kill left behind is none."""
    texts = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(text) for text in texts if text]


def forward(network, batches):
    for start in range(0, len(batches), TOGETHER):
        chosen = np.arange(start, min(start + TOGETHER, len(batches)))
        yield np.asarray(network.predict_on_batch(batches.batch(chosen)[0]))


def in_batches(predict, inputs):
    parts = [inputs[start : start + TOGETHER] for start in range(0, len(inputs), TOGETHER)]
    return np.concatenate([np.asarray(predict(part)) for part in parts])


def _fit(fits, name, rate, seed, file, states):
    for line in read_lines(file):
        if (line["kind"], line["rate"], line["seed"]) == ("fit", rate, seed):
            return
    begun = time.process_time()
    state, history, seconds, validation = fits.fit(rate, seed)
    np.savez(_state(states, name, rate, seed), **state)
    sizes = [
        record_bytes(RecordDict({"arrays": state_record(fits.plan, state, wire)}))
        for wire in ("float32", "float16")
    ]
    line = {
        "kind": "fit",
        "arm": name,
        "rate": rate,
        "seed": seed,
        "dice": max(history),
        "best_epoch": int(np.argmax(history)) + 1,
        "history": history,
        "epoch_seconds": seconds,
        "validation_seconds": validation,
        "seconds": time.process_time() - begun,
        "trained": fits.trained,
        "bytes": sizes,
    }
    _append(file, line)


def _test(shared, fits, name, rate, seed, state, file):
    begun = time.process_time()
    line = {"kind": "test", "arm": name, "rate": rate, "seed": seed}
    with np.load(shared.folder / "test.npz") as seen:
        for key, kept in (("persons", state), ("half", rounded(fits.plan, state, "float16"))):
            line[key] = {}
            for case in shared.cases("test"):
                outputs = fits.outputs(kept, seen[case.name])
                replay = Replay(output[np.newaxis] for output in outputs)
                rows = evaluate_case(
                    fits.model, case, replay, "", shared.bias_fields, distances=key == "persons"
                )
                line[key][case.person] = {row.label: [row.dice, row.hd95] for row in rows}
    _append(file, line | {"seconds": time.process_time() - begun})


def _state(states, name, rate, seed):
    return states / f"{name.replace(' ', '-')}-{rate:g}-{seed}.npz"


def _append(file, line):
    with file.open("ab+") as stream:
        if stream.tell():  # a kill may have left half a line behind
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                text = file.read_bytes()
                stream.truncate(text.rfind(b"\n") + 1)
        stream.write(json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
