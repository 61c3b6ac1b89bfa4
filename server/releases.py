"""All releases of a coordinator, and which of them is the current one of its model.

The newest is, until people go back to an earlier one; from then on that is, until there is a newer.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.json_record import read_record
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.generation import generation_of
from dafne_federated.server.release import mean_score

CURRENT = "current-releases.json"


@dataclass(frozen=True)
class Release:
    """One release.

    Attributes:
        run: Its run.
        name: Of the model.
        file: The `.model`.
        digest: SHA-256 of it.
        created: When its run was started, seconds since 1970.
        base_dice: Mean Dice of the base on validation persons, if measured.
        dice: That of the release.
        current: Whether it is the current one of its model.
    """

    run: RunFolder
    name: str
    file: Path
    digest: str
    created: int
    base_dice: float | None
    dice: float | None
    current: bool


class _Choice(BaseModel):
    """What people went back to, and what was the newest when they did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    newest: str


class _Choices(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    models: dict[str, _Choice] = {}


def releases(path: Path) -> list[Release]:
    """Return the releases below the folder of a coordinator, or of runs; the oldest first.

    Raises:
        RunError: A file of a run is damaged.
    """
    folder = _runs(path)
    files = [*folder.glob("*/result.json"), *folder.glob("*/versions/[0-9]*/result.json")]
    runs = [RunFolder(found.parent) for found in files]
    results = [(run, run.info(), run.result()) for run in runs]
    found = sorted(
        ((r, i, e) for r, i, e in results if e.released),
        key=lambda item: (item[1].created, run_name(item[0])),
    )
    names = [result.release.partition("_")[0] for _, _, result in found]
    newest = {n: e.release_digest for n, (_, _, e) in zip(names, found, strict=True)}
    chosen = _choices(folder).models
    current = {
        name: chosen[name].digest if name in chosen and chosen[name].newest == digest else digest
        for name, digest in newest.items()
    }
    return [
        Release(
            run=run,
            name=name,
            file=run.release / result.release,
            digest=result.release_digest,
            created=info.created,
            base_dice=mean_score(result.base_dice),
            dice=mean_score(result.dice),
            current=current[name] == result.release_digest,
        )
        for name, (run, info, result) in zip(names, found, strict=True)
    ]


def run_name(run: RunFolder) -> str:
    """Return the name of a run; of a version of a generation, such as ``thigh/0002``."""
    generation = generation_of(run)
    return f"{generation.path.name}/{run.path.name}" if generation else run.path.name


def release_of(path: Path, run: str) -> Release:
    """Return the release of a run by its name.

    Raises:
        RunError: There is none.
    """
    known = releases(path)
    for release in known:
        if run_name(release.run) == run:
            return release
    names = ", ".join(run_name(release.run) for release in known) or "none"
    msg = f"expected a run with a release ({names}), got {run!r}"
    raise RunError(msg)


def make_current(path: Path, release: Release) -> None:
    """Remember that people went back, or forward, to a release."""
    newest = [own for own in releases(path) if own.name == release.name][-1]
    folder = _runs(path)
    choice = _Choice(digest=release.digest, newest=newest.digest)
    choices = _Choices(models=_choices(folder).models | {release.name: choice})
    write_atomic(folder / CURRENT, choices.model_dump_json(indent=2).encode())


def _runs(path: Path) -> Path:
    return path / "runs" if (path / "runs").is_dir() else path


def _choices(folder: Path) -> _Choices:
    path = folder / CURRENT
    return read_record(path, _Choices, "a folder of runs") if path.exists() else _Choices()
