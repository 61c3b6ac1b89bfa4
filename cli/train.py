"""`dafne-federated train`: a new Dafne model from scratch."""

import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.evaluate import cases_of_site
from dafne_federated.cli.output_file import check_output
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.dataset import DataFolder, load_case, open_folder, split_persons
from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.function_sources import check_grid, thigh_spec
from dafne_federated.core.settings import read_settings
from dafne_federated.simulations.progress import Advance, Stages, epoch_note


def train(
    data: Annotated[Path, typer.Argument(help="Folder of NIfTI pairs or Dafne bundles.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .model file.")],
    name: Annotated[str, typer.Option(help="Name of the model in Dafne.")] = "",
    site: Annotated[str | None, typer.Option(help="Only the cases of this site.")] = None,
    preset: Annotated[
        str, typer.Option(help="'thigh' for the geometry of Dafne's thigh network, or 'small'.")
    ] = "small",
    size: Annotated[int | None, typer.Option(help="Rows and columns of the input.")] = None,
    resolution: Annotated[float | None, typer.Option(help="Pixel size in mm.")] = None,
    sides: Annotated[
        bool, typer.Option(help="Trained on right sides; left ones are mirrored in Dafne.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="At most so many passes.")] = 60,
    patience: Annotated[int, typer.Option(min=1, help="Stop after so many without gain.")] = 15,
    batch_size: Annotated[int, typer.Option(min=1, help="Slices in a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of Adam at the start.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="All randomness follows from it.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all cores.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Train a new Dafne model from scratch; one person in five chooses the best epoch.

    Example: dafne-federated train data/hippocampus -o Hippocampus.model --name Hippocampus
    """
    chosen = read_settings(
        None,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
        device=device,
    )
    check_grid(size, resolution)
    if preset not in ("small", "thigh"):
        msg = f"preset: expected 'small' or 'thigh', got {preset!r}"
        raise SettingsError(msg)
    approvals = Approvals()
    check_output(output)
    check_output(approvals.path, replace=True)
    folder = open_folder(data)
    labels = _labels(folder, sides)
    refs = cases_of_site(folder, site)
    parts = split_persons(refs, (4, 1), seed)
    training, validation = ([load_case(ref, folder.labels) for ref in part] for part in parts)
    prepare_backend(chosen.threads, chosen.device)
    from dafne_federated.core.base_training import FitSettings, propose_spec, train_base
    from dafne_federated.core.model_file import write_model

    if preset == "thigh":
        spec = thigh_spec(labels, sides)
    else:
        spec = propose_spec([*training, *validation], labels, size, resolution, sides=sides)
    settings = FitSettings(epochs, patience, batch_size, learning_rate, seed)
    with Stages(quiet) as stages, ExitStack() as started:
        prepared = _bar(stages, started, "Preparing images", len(refs))
        trained = _bar(stages, started, "Training", epochs)
        file, fit = train_base(
            spec,
            training,
            validation,
            name or folder.name or output.stem,
            settings,
            int(time.time()),
            on_case=lambda: prepared(""),
            on_epoch=lambda _epoch, loss, dice: trained(epoch_note(loss, dice)),
        )
    written = write_model(file, output)
    approvals.add(written, "trained on this machine")
    print(f"{output}  {written.digest}")
    if fit.best_dice is None:
        print(f"trained {len(fit.history)} epochs; one person leaves nobody to validate on")
    else:
        epochs_run = len(fit.history)
        print(f"validation Dice {fit.best_dice:.3f} in epoch {fit.best_epoch} of {epochs_run}")


def _labels(folder: DataFolder, sides: bool) -> list[str]:
    """Return the label names of a folder, channel 1 first; each must be there once.

    With ``sides`` the model names the side itself, so left and right of a label are one.
    """
    labels = list(folder.labels.values())
    if sides:
        return list(dict.fromkeys(n[:-2] if n.endswith(("_L", "_R")) else n for n in labels))
    for label, count in Counter(labels).items():
        if count > 1:
            msg = f"labels: expected a name of its own for each number, got {label!r} {count} times"
            raise DataError(msg)
    return labels


def _bar(stages: Stages, started: ExitStack, name: str, total: int) -> Advance:
    """Return what advances a bar that shows from its first step on; an error before has none."""
    shown: list[Advance] = []

    def advance(note: str = "") -> None:
        if not shown:
            shown.append(started.enter_context(stages.stage(name, total)))
        shown[0](note)

    return advance
