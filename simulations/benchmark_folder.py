"""The folder of a benchmark: everything in it is named by what acts on it, so it may be shared.

benchmark.json   the scenario as it was started last, and where its images come from
images-XX/       the images as they are used
bases/XX/        base, and where its labels are others, what the arms start from
cache/           prepared slices, features and bias fields
runs/            federated fits that are under way
fits/XX.npz      weights of finished fits
results.jsonl    one line per base and per fit
final.json       the choice of settings, from the moment on at which the test was touched
final.jsonl      one line per test
pictures/        what some arms drew on test persons; for the local report alone
logs/            what the processes said
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dafne_federated.core.dataset import DataFolder, open_folder
from dafne_federated.core.files import private_folder, sha256, write_atomic
from dafne_federated.core.json_record import read_record
from dafne_federated.simulations.benchmark_scenario import Fold, Scenario

PARENT = "DAFNE_FEDERATED_BENCHMARK"  # environment: the process that started one for a piece


class Started(BaseModel):
    """What a benchmark was started with.

    Attributes:
        name: Name of the scenario.
        scenario: Its content.
        data: Folder of the original images; None for phantom limbs.
        data_digest: SHA-256 of what lies there.
        command: What a person typed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scenario: Scenario
    data: Path | None
    data_digest: str
    command: str


@dataclass(frozen=True)
class BenchmarkFolder:
    """Where things are.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def results(self) -> Path:
        """Lines of bases and fits."""
        return self.path / "results.jsonl"

    @property
    def choice(self) -> Path:
        """The choice of settings; there from the moment on at which the test was touched."""
        return self.path / "final.json"

    @property
    def final(self) -> Path:
        """Lines of tests."""
        return self.path / "final.jsonl"

    @property
    def tested_cells(self) -> frozenset[str]:
        """The fits that the test is made of; empty as long as it was not begun."""
        if not self.choice.exists():
            return frozenset()
        return frozenset(json.loads(self.choice.read_text())["cells"])

    @property
    def report(self) -> Path:
        """The report, with pictures of persons: for this machine alone."""
        return self.path / "report.html"

    @property
    def cache(self) -> Path:
        """Prepared slices, bias fields and features."""
        return self.path / "cache"

    def begin(self, started: Started) -> None:
        """Write what a benchmark is started with."""
        private_folder(self.path)
        text = started.model_dump_json(indent=1, by_alias=True)
        write_atomic(self.path / "benchmark.json", text.encode())

    def started(self) -> Started:
        """Return what the benchmark was started with.

        Raises:
            RunError: This is not the folder of a benchmark.
        """
        return read_record(self.path / "benchmark.json", Started, "the folder of a benchmark")

    def images(self, started: Started) -> Path:
        """Return the folder of the images as the scenario uses them."""
        scenario = started.scenario
        parts = [started.data_digest, scenario.every_nth_slice, scenario.network.base_labels]
        parts.append(bool(scenario.sites.wrong_labels))
        return self.path / f"images-{_short(parts)}"

    def base(self, started: Started, fold: Fold) -> Path:
        """Return the folder of the base of a fold."""
        whole = started.scenario.model_dump(mode="json")
        parts = [self.images(started).name, fold.model_dump(mode="json"), whole["network"]]
        persons = {key: value for key, value in whole["persons"].items() if key != "folds"}
        return self.path / "bases" / _short([*parts, persons, started.scenario.division])

    def fit(self, cell: str) -> Path:
        """Return the file of the weights of a finished fit."""
        return self.path / "fits" / f"{cell}.npz"

    def pictures(self, cell: str) -> Path:
        """Return the file of what a fit drew on test persons."""
        return self.path / "pictures" / f"{cell}.npz"


def folder_digest(images: DataFolder) -> str:
    """Return a digest of the images and masks of a data folder, and of who is who in it."""
    parts = []
    for ref in images.cases:
        files = [ref.image, *([ref.label] if ref.label else [])]
        digests = [sha256(path.read_bytes()) for path in files]
        parts.append([ref.name, ref.person, ref.site, *digests])
    return sha256(json.dumps([sorted(images.labels.items()), parts]).encode())


def data_digest(scenario: Scenario, source: Path | None) -> str:
    """Return a digest of the images that a scenario starts from."""
    if source is not None:
        return folder_digest(open_folder(source))
    parts = ["phantoms", scenario.persons.phantoms, scenario.division]
    return sha256(json.dumps(parts, sort_keys=True).encode())


def _short(parts: object) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode())[:12]
