"""What all arms of a fold share: base, persons, prepared slices, and how they are measured."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dafne_federated.client.site_cache import SiteCache
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import set_seed
from dafne_federated.core.base_training import FitSettings, propose_spec, train_base
from dafne_federated.core.dataset import DataFolder, load_case, open_folder, split_persons
from dafne_federated.core.evaluation import known_masks, label_map
from dafne_federated.core.metrics import agreement, judged, mean
from dafne_federated.core.model_file import Weights, read_model, write_model
from dafne_federated.core.model_runtime import Loss, RunningModel, build_model
from dafne_federated.core.new_task import new_task
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.training import slice_dice
from dafne_federated.core.volumes import Case
from dafne_federated.simulations.benchmark_division import Division, divide_persons
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder, Started
from dafne_federated.simulations.benchmark_records import BaseLine, Score, append_line

Predict = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Stopwatch:
    """Wall and processor time since it was made."""

    wall: float
    cpu: float

    @classmethod
    def started(cls) -> "Stopwatch":
        """Return one that starts now."""
        return cls(time.monotonic(), time.process_time())

    @property
    def seconds(self) -> float:
        """Wall time until now."""
        return time.monotonic() - self.wall

    @property
    def cpu_seconds(self) -> float:
        """Time of the processor until now, all threads."""
        return time.process_time() - self.cpu


class Task:
    """The task of one fold; the base must have been trained.

    Args:
        folder: Folder of the benchmark.
        started: What it was started with.
        fold: Number of the fold.
    """

    def __init__(self, folder: BenchmarkFolder, started: Started, fold: int) -> None:
        self.folder, self.started, self.scenario = folder, started, started.scenario
        self.images = folder.images(started)
        self.fold = started.scenario.persons.folds[fold]
        self.division = division_of(folder, started, fold)
        self.base_path = folder.base(started, self.fold) / "task.model"
        self.approvals = Approvals(self.base_path.with_name("approved-models.json"))
        self.model = RunningModel(read_model(self.base_path), self.approvals)
        self.bias_fields = BiasFieldCache(folder.cache / "bias-fields")
        self._cache = SiteCache(folder.cache)
        self._opened: dict[str, DataFolder] = {}
        self._written: Weights | None = None

    @property
    def loss(self) -> Loss:
        """The base's own loss."""
        site = next(iter(self.division.sites))
        for name in self.division.sites[site].trained_on(0):
            if self.model.loss is None:
                self.model.prepare(self.case(name, site), cache=self.bias_fields)
        assert self.model.loss is not None  # a site has slices, or no fit would come so far
        return self.model.loss

    def image_folder(self, site: str | None = None) -> DataFolder:
        """Return the images, as a site sees them."""
        wrong = site in self.scenario.sites.wrong_labels
        part = "wrong" if wrong else "images"
        if part not in self._opened:
            self._opened[part] = open_folder(self.images / part)
        return self._opened[part]

    def case(self, name: str, site: str | None = None) -> Case:
        """Read a case, with the masks that ``site`` drew."""
        images = self.image_folder(site)
        return load_case(next(ref for ref in images.cases if ref.name == name), images.labels)

    def slices(self, names: Iterable[str], site: str | None = None) -> PreparedSlices | None:
        """Return the prepared slices of cases; None if there are none."""
        parts = [self._prepared(self.case(name, site)) for name in names]
        kept = [part for part in parts if part is not None]
        return concatenate(kept) if kept else None

    def site_slices(self, persons: int) -> dict[str, PreparedSlices]:
        """Return the training slices of each site."""
        sites = self.division.sites.items()
        found = {name: self.slices(site.trained_on(persons), name) for name, site in sites}
        return {name: slices for name, slices in found.items() if slices is not None}

    def site_validation(self) -> dict[str, PreparedSlices]:
        """Return the validation slices of each site that has some."""
        sites = self.division.sites.items()
        found = {name: self.slices(site.validation, name) for name, site in sites}
        return {name: slices for name, slices in found.items() if slices is not None}

    def random_weights(self, seed: int) -> Weights:
        """Return random weights for the network of the base."""
        set_seed(seed, "scratch")
        sources = {key: text for key, text in self.model.file.functions.items() if text}
        return build_model("scratch", sources, 0, self.model.file.metadata).weights

    def write(self, weights: Weights) -> None:
        """Write weights into the network."""
        self.model.network.set_weights([weights[key] for key in sorted(weights)])

    def predict_with(self, weights: Weights) -> Predict:
        """Return what gives the network's output with some weights."""

        def predict(inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
            if self._written is not weights:
                self.write(weights)
                self._written = weights
            return np.asarray(self.model.network.predict_on_batch(inputs.astype(np.float32)))

        self._written = None  # what is in the network now is not known
        return predict

    def network(self, weights: Weights) -> Any:
        """Return another network of the same kind with some weights."""
        network = RunningModel(self.model.file, self.approvals).network
        network.set_weights([weights[key] for key in sorted(weights)])
        return network

    def validation_dice(self, slices: PreparedSlices | None) -> float | None:
        """Return the Dice of the weights that are written in the network."""
        if slices is None:
            return None
        return slice_dice(self.model.network.predict_on_batch, slices.without_weights())

    def scores(
        self,
        models: Mapping[str, Predict],
        names: Sequence[str],
        held_out: bool = False,
        distances: bool = False,
        pictures: dict[str, npt.NDArray[np.uint8]] | None = None,
    ) -> list[Score]:
        """Return how models segment persons.

        Args:
            models: By site; of several, that of the person's own site counts, or their mean.
            names: Names of the cases.
            held_out: Whether their site took no part.
            distances: Whether to measure HD95.
            pictures: Filled with what the first model asked drew on ``shown_slice`` of each case.
        """
        found = []
        for name in names:
            case = self.case(name)
            truth = known_masks(self.model, case)
            asked = [models[case.site]] if case.site in models else list(models.values())
            rows = []
            for predict in asked:
                drawn = self.model.apply(case, predict, cache=self.bias_fields)
                rows.append(judged(agreement(name, truth, drawn, case.spacing, distances)))
                if pictures is not None:
                    index = shown_slice(truth)
                    pictures.setdefault(name, label_map(self.model, drawn, index))
            for same in zip(*rows, strict=True):
                dice, hd95 = mean([row.dice for row in same]), mean([row.hd95 for row in same])
                found.append(
                    Score(
                        person=case.person,
                        site=case.site,
                        case=name,
                        label=same[0].label,
                        dice=min(max(dice or 0.0, 0.0), 1.0),
                        hd95=hd95,
                        held_out=held_out,
                    )
                )
        return found

    def _prepared(self, case: Case) -> PreparedSlices | None:
        key = self._cache.slices_key(case, self.model.file, "")
        slices = self._cache.slices(key)
        if slices is None:
            slices = self.model.prepare(case, cache=self.bias_fields)
            if slices is not None:
                self._cache.keep_slices(key, slices)
        return slices


def shown_slice(truth: Mapping[str, npt.NDArray[np.bool_]]) -> int:
    """Return the slice with the most that people drew."""
    return int(np.argmax(np.sum([mask.sum(axis=(0, 1)) for mask in truth.values()], axis=0)))


def division_of(folder: BenchmarkFolder, started: Started, fold: int) -> Division:
    """Return who is where in a fold."""
    images = open_folder(folder.images(started) / "images")
    chosen = started.scenario.persons.folds[fold]
    return divide_persons(images.cases, started.scenario, chosen)


def make_base(folder: BenchmarkFolder, started: Started, fold: int) -> None:
    """Train the base of a fold and keep it, if it is not there yet."""
    scenario, chosen = started.scenario, started.scenario.persons.folds[fold]
    target = folder.base(started, chosen)
    if (target / "task.model").exists():
        return
    begun = Stopwatch.started()
    images = folder.images(started)
    network = scenario.network
    base_images = open_folder(images / ("base" if network.base_labels else "images"))
    names = set(division_of(folder, started, fold).base)
    refs = [ref for ref in base_images.cases if ref.name in names]
    parts = split_persons(refs, (4, 1), scenario.division)
    training, validation = ([load_case(r, base_images.labels) for r in part] for part in parts)
    labels = list(base_images.labels.values())
    spec = propose_spec(
        [*training, *validation],
        labels,
        network.size,
        network.resolution,
        network.filters,
        network.strides,
    )
    settings = FitSettings(
        network.base_epochs,
        network.base_patience,
        network.batch_size,
        network.base_learning_rate,
        scenario.division,
    )
    cache = BiasFieldCache(folder.cache / "bias-fields")
    file, fit = train_base(spec, training, validation, started.name, settings, 1, cache)
    approvals = Approvals(target / "approved-models.json")
    base = write_model(file, target / "base.model")
    approvals.add(base, "trained by this benchmark")
    task = base
    if network.base_labels:
        known = list(open_folder(images / "images").labels.values())
        task = new_task(base, known, scenario.division)
    written = write_model(task, target / "task.model")
    approvals.add(written, "made by this benchmark")
    line = BaseLine(
        scenario=started.name,
        scenario_digest=scenario.digest,
        fold=chosen.name,
        persons=len({ref.person for ref in refs}),
        epochs=len(fit.history),
        dice=fit.best_dice,
        seconds=begun.seconds,
        cpu_seconds=begun.cpu_seconds,
        digest=written.digest,
    )
    append_line(folder.results, line)
