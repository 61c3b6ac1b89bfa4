"""A task to learn: a bright and a dark square on grey, and a tiny base that is good at it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.volumes import Case


def square_case(name: str, seed: int, size: int = 40, slices: int = 4) -> Case:
    """Bright square and dark square on grey, at places that follow the seed."""
    generator = np.random.default_rng(seed)
    image = generator.normal(100, 5, (size, size, slices)).astype(np.float32)
    masks = {n: np.zeros(image.shape, bool) for n in ("bright", "dark")}
    for index in range(slices):
        row, column = generator.integers(4, 10, 2)
        masks["bright"][row : row + 12, column : column + 10, index] = True
        masks["dark"][row + 14 : row + 24, column : column + 12, index] = True
    image[masks["bright"]] += 80
    image[masks["dark"]] -= 60
    return Case(
        name=name,
        person=name,
        site="",
        image=np.maximum(image, 1),
        masks=masks,
        spacing=(1.0, 1.0, 3.0),
        affine=np.diag([1.0, 1.0, 3.0, 1.0]),
    )


@dataclass(frozen=True)
class Trained:
    """A `.model` on disk that is good at its task, and who may run it."""

    path: Path
    approvals: Approvals
    dice: float


def train_squares(folder: Path) -> Trained:
    """Train a tiny base on squares and write it into a folder."""
    from dafne_federated.core.base_training import FitSettings, propose_spec, train_base
    from dafne_federated.core.model_file import write_model

    cases = [square_case(f"person-{seed}", seed) for seed in range(5)]
    spec = propose_spec(cases, ["bright", "dark"], filters=(4, 8, 12), strides=(2, 2))
    settings = FitSettings(epochs=40, patience=40, batch_size=4, learning_rate=5e-3, seed=3)
    file, fit = train_base(spec, cases[:4], cases[4:], "Squares", settings, 1_700_000_000)
    approvals = Approvals(folder / "approved.json")
    approvals.add(write_model(file, folder / "base.model"), "made by a test")
    return Trained(folder / "base.model", approvals, fit.best_dice)
