"""What all arms of `methods.py` share: who is where, the base, the task, and prepared slices.

Everything is kept in the folder of a run; what is there stays.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.base_training import FitSettings, propose_spec, train_base
from dafne_federated.core.dataset import load_case, open_folder
from dafne_federated.core.model_file import read_model, write_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.new_task import new_task
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.slices import PreparedSlices

WHOLE = "hippocampus"
LABELS = ("anterior_hippocampus", "posterior_hippocampus")
SIZE = 56  # pixels of 1 mm; the largest image has 58 rows
_ARRAYS = ("images", "labels", "weights")


@dataclass(frozen=True)
class Design:
    """What decides the figures; a folder holds one design.

    Attributes:
        data: The folder of images.
        persons: For the base, training, validation and test.
        division: Seed of who is where.
        base_epochs: At most, for the base.
        epochs: Passes of every fit over the training slices.
        batch: Slices in a step.
        nth: Every so manieth labelled slice is trained on, or chooses the epoch.
        rates: Learning rates to choose from, for each arm, on the validation persons.
        seeds: Of the fits; the first one chooses the rate.
        filters: Channels of the network's levels.
    """

    data: str
    persons: tuple[int, int, int, int]
    division: int
    base_epochs: int
    epochs: int
    batch: int
    nth: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    filters: tuple[int, ...]


class Shared:
    """Base, task and slices in the folder of a run."""

    def __init__(self, folder: Path, design: Design):
        self.folder, self.design = folder, design
        self.approvals = Approvals(folder / "approved.json")
        self.bias_fields = BiasFieldCache(folder / "bias-fields")
        data = open_folder(Path(design.data))
        self._refs, self._labels = {ref.name: ref for ref in data.cases}, data.labels

    def prepare(self):
        """Make what all arms share; what is in the folder already stays."""
        if not (self.folder / "division.json").exists():
            self._divide()
        if not (self.folder / "base.model").exists():
            self._train_base()
        if not (self.folder / "task.model").exists():
            base = read_model(self.folder / "base.model")
            task = write_model(
                new_task(base, LABELS, self.design.division), self.folder / "task.model"
            )
            self.approvals.add(task, "made by this benchmark")
        if not (self.folder / "test.npz").exists():
            model = self.model()
            for part in ("training", "validation"):
                slices = model.prepare_all(self.cases(part), cache=self.bias_fields)
                chosen = np.arange(0, len(slices), self.design.nth)
                arrays = {name: getattr(slices, name)[chosen] for name in _ARRAYS}
                np.savez(self.folder / f"{part}.npz", **arrays)
            seen = {case.name: self._seen(model, case) for case in self.cases("test")}
            np.savez(self.folder / "unfinished.npz", **seen)
            os.replace(self.folder / "unfinished.npz", self.folder / "test.npz")

    def division(self):
        return json.loads((self.folder / "division.json").read_text())

    def cases(self, part):
        for name in self.division()[part]:
            yield load_case(self._refs[name], self._labels)

    def slices(self, part):
        with np.load(self.folder / f"{part}.npz") as arrays:
            return PreparedSlices(**dict(arrays), channels=len(LABELS) + 1)

    def model(self):
        return RunningModel(read_model(self.folder / "task.model"), self.approvals)

    def _divide(self):
        names = sorted(self._refs)
        if len({ref.person for ref in self._refs.values()}) != len(names):
            raise SystemExit("expected one image for each person")
        if sum(self.design.persons) > len(names):
            raise SystemExit(f"expected {sum(self.design.persons)} persons, got {len(names)}")
        order = iter(np.random.default_rng(self.design.division).permutation(names).tolist())
        parts = zip(("base", "training", "validation", "test"), self.design.persons, strict=True)
        division = {part: [next(order) for _ in range(count)] for part, count in parts}
        (self.folder / "division.json").write_text(json.dumps(division, indent=1))

    def _train_base(self):
        cases = [
            replace(case, masks={WHOLE: np.logical_or.reduce([case.masks[n] for n in LABELS])})
            for case in self.cases("base")
        ]
        spec = propose_spec(cases, [WHOLE], SIZE, 1.0, filters=self.design.filters)
        # Over a crop of 50 mm the bias field is nearly flat; one level takes a tenth of the time.
        spec = spec.model_copy(update={"bias_levels": 1})
        held_out = max(len(cases) // 10, 1)
        epochs = self.design.base_epochs
        settings = FitSettings(epochs, epochs, self.design.batch, seed=self.design.division)
        file, fit = train_base(
            spec, cases[held_out:], cases[:held_out], "Hippocampus", settings, 1_700_000_000,
            self.bias_fields,
        )  # fmt: skip
        found = {"dice": fit.best_dice, "best_epoch": fit.best_epoch, "seconds": fit.seconds}
        (self.folder / "base.json").write_text(json.dumps(found | {"history": fit.history}))
        base = write_model(file, self.folder / "base.model")
        self.approvals.add(base, "trained by this benchmark")

    def _seen(self, model, case):
        """Return what the network is given when the model is applied to a case."""
        inputs = []

        def look(given):
            inputs.append(given.astype(np.float32))
            return np.zeros((*given.shape[:-1], len(LABELS) + 2), np.float32)

        model.apply(case, look, cache=self.bias_fields)
        return np.concatenate(inputs)
