"""Whether a `.model` is a release that passed its checks, by the folder of the run it came from."""

from dataclasses import dataclass
from pathlib import Path

from dafne_federated.core.errors import ReleaseError
from dafne_federated.core.fine_tuning_folder import FineTuningInfo, FineTuningResult
from dafne_federated.core.json_record import read_record
from dafne_federated.core.metrics import mean
from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.signed_release import MANIFEST, SIGNATURE, checked_manifest, verify
from dafne_federated.server.deployment_folder import home_of
from dafne_federated.server.generation import earlier_releases
from dafne_federated.server.release import mean_score
from dafne_federated.simulations.release_check import load_release_check

# Folding changes the order of float32 sums; anything larger is another network.
_LARGEST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Origin:
    """What is known of where a model comes from.

    Attributes:
        base_digest: SHA-256 of the version it was adapted from, or None.
        earlier: SHA-256 of the releases before it in its generation; it may follow each of them.
        dice: Mean Dice on validation persons, or None.
        objection: Why it should not be published, in words; empty if it may.
    """

    base_digest: str | None
    dice: float | None
    objection: str
    earlier: tuple[str, ...] = ()


def release_origin(path: Path, model: ModelFile, run: Path | None = None) -> Origin:
    """Return where a model comes from.

    Args:
        path: The file.
        model: Its content.
        run: The folder of the run; by default that around ``release/``, or ``NAME.run`` beside
            the file, as ``simulate`` and ``finetune`` make them.

    Raises:
        RunError: ``run`` is given and is no such folder, or a file in it is damaged.
    """
    told = model.metadata.get("federated")
    base = told.get("base_sha256") if isinstance(told, dict) else None
    base = base if isinstance(base, str) else None
    if base is None:
        return Origin(None, None, "its metadata has no record of a run of this package")
    usual = (
        path.absolute().parent.parent,
        path.with_name(f"{path.name.removesuffix('.model')}.run"),
    )
    folder = run or next((f for f in usual if (f / "run.json").is_file()), None)
    if folder is None:
        return Origin(base, None, "the folder of its run is not beside it (name it with --run)")
    if (folder / "rounds.jsonl").exists():
        return _of_federation(path, RunFolder(folder), model, base)
    return _of_fine_tuning(folder, model, base)


def _of_federation(path: Path, folder: RunFolder, model: ModelFile, base: str) -> Origin:
    info, result = folder.info(), folder.result()
    dice = mean_score(result.dice) if result.released else None
    check = load_release_check(folder)
    if not result.released:
        objection = f"the run released nothing: {result.reason}"
    elif result.release_digest != model.digest:
        objection = f"it is not the release of the run in {str(folder.path)!r}"
    elif info.settings.gate == "none":
        objection = "it was released without a gate"
    elif check is not None and not check.difference <= _LARGEST_DIFFERENCE:
        objection = f"its release check failed: {check}"
    elif info.base_digest != base:
        objection = "its record names another base than its run"
    else:
        objection = _signature_fault(path, folder, model)
    return Origin(base, dice, objection, tuple(earlier_releases(folder)))


def _signature_fault(path: Path, run: RunFolder, model: ModelFile) -> str:
    """Return what is wrong with the signature; only a simulation needs none."""
    home = home_of(run)
    public = home.release_public if home else None
    beside = (path.parent / MANIFEST).exists()
    folder = path.parent if beside else run.release
    if home is None and not (folder / SIGNATURE).exists():
        return ""
    try:
        if beside:
            verify(path, public)
            return ""
        manifest, _ = checked_manifest(folder, public)  # the file was moved out of its release
    except ReleaseError as error:
        return str(error)
    return "" if model.digest in manifest.files.values() else f"{MANIFEST} does not list it"


def _of_fine_tuning(folder: Path, model: ModelFile, base: str) -> Origin:
    ended = "the folder of a run that has ended"
    info = read_record(folder / "run.json", FineTuningInfo, ended)
    result = read_record(folder / "result.json", FineTuningResult, ended)
    if not result.written:
        objection = f"the run wrote nothing: {result.reason}"
    elif result.digest != model.digest:
        objection = f"it is not the result of the run in {str(folder)!r}"
    elif info.given_digest != info.base_digest:
        objection = "its labels are new, so it is no version of a model on a server"
    elif info.settings.gate == "none":
        objection = "it was written without a gate"
    else:
        objection = ""
    return Origin(base, mean([result.dice]), objection)
