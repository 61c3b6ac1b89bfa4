"""A generation: one base, one plan, and the versions of the model that came of them.

It is the folder of a run that trains nothing itself. ``generation.json`` says so; beside it,
``versions/0001`` and so on are runs of their own, each with its rounds, report and release.
A new generation is a new folder, with a release as its base.
"""

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.files import arrays_digest, write_atomic
from dafne_federated.core.json_record import read_record
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.server.continuation import (
    Absent,
    Continuation,
    continuation,
    keep_continuation,
)


class GenerationInfo(BaseModel):
    """How a generation goes on.

    Attributes:
        every: Seconds between two questions for new cases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: float = Field(default=600.0, gt=0)


def make_generation(folder: RunFolder, info: GenerationInfo) -> None:
    """Make a new run folder that of a generation.

    Raises:
        SettingsError: See ``check_continuous``.
    """
    check_continuous(folder.info().settings)
    write_atomic(_record(folder), info.model_dump_json().encode())


def is_generation(folder: RunFolder) -> bool:
    """Return whether a run folder is that of a generation."""
    return _record(folder).exists()


def generation_info(folder: RunFolder) -> GenerationInfo:
    """Return how a generation goes on.

    Raises:
        RunError: It is none, or its file is damaged.
    """
    return read_record(_record(folder), GenerationInfo, "the folder of a generation")


def check_continuous(settings: RunSettings) -> None:
    """Refuse what does not go with versions that only some sites train.

    Raises:
        SettingsError: In words, and what to take.
    """
    rules = STRATEGY_TABLE[settings.strategy]
    faults = {
        "releases no model for everybody; take strategy 'product'": not rules.common,
        "moves another factor in each round; take strategy 'frozen-a'": not rules.late,
    }
    for words, wrong in faults.items():
        if wrong:
            msg = f"a federation that goes on: strategy {settings.strategy!r} {words}"
            raise SettingsError(msg)
    for name, wanted in (
        ("robust", "none"),
        ("server_optimiser", "none"),
        ("statistics", "base"),
        ("class_weights", "case"),
    ):
        if (got := getattr(settings, name)) != wanted:
            flag = name.replace("_", "-")
            msg = (
                f"a federation that goes on: {flag} reckons with the same sites in all rounds; "
                f"expected {wanted!r}, got {got!r}"
            )
            raise SettingsError(msg)
    if settings.privacy == "site":
        msg = (
            "a federation that goes on: privacy 'site' counts a fixed number of rounds; take "
            "privacy 'person' or 'none'"
        )
        raise SettingsError(msg)


def versions(folder: RunFolder) -> list[RunFolder]:
    """Return the versions of a generation, the oldest first; the last may be unfinished."""
    found = sorted((folder.path / "versions").glob("[0-9]*/continues.json"))
    return [RunFolder(path.parent) for path in found]


def generation_of(version: RunFolder) -> RunFolder | None:
    """Return the generation that a version belongs to; None if the run is no version of one."""
    folder = RunFolder(version.path.absolute().parent.parent)
    return folder if continuation(version) and is_generation(folder) else None


def earlier_releases(version: RunFolder) -> list[str]:
    """Return the SHA-256 of what was released before a version of its generation."""
    folder = generation_of(version)
    if folder is None:
        return []
    own = version.info().created
    before = [v for v in versions(folder) if v.info().created < own and is_closed(v)]
    return [v.result().release_digest for v in before if v.result().released]


def is_closed(version: RunFolder) -> bool:
    """Return whether a version came to its end, with a release or without."""
    return (version.path / "result.json").exists()


def counts(version: RunFolder) -> bool:
    """Return whether a version uses up the new cases of its sites: not if nobody judged it."""
    decision = version.result().decision if is_closed(version) else None
    return decision is None or bool(decision.looked_at)


def last_trained(folder: RunFolder) -> dict[str, str]:
    """Return the last run in which an update of a site was used, by name of the site.

    A version that came to its end without anybody judging it is as if it had not been.
    """
    return {
        name: version.info().run
        for version in versions(folder)
        if counts(version)
        for name in trained_cases(version)
    }


def trained_cases(version: RunFolder) -> dict[str, int]:
    """Return the training cases of the sites whose updates a version used, by name."""
    return {name: site.training_cases for name, site in _trained(version.rounds())}


def add_version(folder: RunFolder, first: State, new_cases: Mapping[str, int]) -> RunFolder:
    """Make the next version; it is there whole or not at all.

    Args:
        folder: The generation.
        first: The state that changes nothing.
        new_cases: What the sites announced that are to train.
    """
    before, info = versions(folder), folder.info()
    for half in (folder.path / "versions").glob(".*"):  # one that a kill left behind
        shutil.rmtree(half)
    created = max(int(time.time()), *(v.info().created + 1 for v in (*before, folder)))
    own = RunInfo.model_validate(
        info.model_dump() | {"run": uuid.uuid4().hex, "created": created},
    )
    released = [version for version in before if version.result().released]
    start = released[-1].state_after(released[-1].result().round or 0) if released else first
    record = Continuation(
        version=len(before) + 1,
        start_digest=arrays_digest(start),
        new_cases=dict(sorted(new_cases.items())),
        contained=_contained(released),
    )
    made = RunFolder.create(
        folder.path / "versions" / f".{uuid.uuid4().hex}", own, folder.plan(), folder.base_bytes()
    )
    made.base.unlink()
    os.link(folder.base, made.base)  # once on disk, however many versions there are
    keep_continuation(made, record, start)
    path = folder.path / "versions" / f"{record.version:04d}"
    os.replace(made.path, path)
    return RunFolder(path)


def drop_version(version: RunFolder) -> None:
    """Remove a version; a kill meanwhile leaves nothing that looks like one."""
    gone = version.path.with_name(f".dropped-{version.path.name}")
    os.replace(version.path, gone)
    shutil.rmtree(gone)


def _contained(released: list[RunFolder]) -> dict[str, Absent]:
    """Return who trained for the state of the last release, and how long ago."""
    found: dict[str, Absent] = {}
    for behind, version in zip(range(len(released), 0, -1), released, strict=True):
        last = version.result().round or 0
        for name, site in _trained(version.rounds()[:last]):
            found[name] = Absent(cases=site.training_cases, behind=behind, lacks=site.lacks)
    return found


def _trained(rounds: Iterable[RoundLine]) -> Iterator[tuple[str, SiteRound]]:
    """Yield what each site gave in each round in which it trained, with its name."""
    for line in rounds:
        if line.trained:
            yield from ((name, site) for name, site in line.sites.items() if site.training_cases)


def _record(folder: RunFolder) -> Path:
    return folder.path / "generation.json"
