"""What a simulation is started with, and its run folder: everything before the first round.

partition.json      data folder, test cases, and the options that decided who is where
sites/              settings of each site
local/              the state that each site reaches alone
release-check.json  how far the released file is from the adapted network

run.json is written last: a folder that has it is complete, and one without it starts again.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from dafne_federated.client.site_settings import SiteSettings, read_site
from dafne_federated.core.approvals import Approvals, home_folder
from dafne_federated.core.base_training import FitSettings, propose_spec, train_base
from dafne_federated.core.dataset import (
    CaseRef,
    DataFolder,
    label_names,
    load_case,
    open_folder,
    split_persons,
)
from dafne_federated.core.errors import DataError, RunError, SettingsError
from dafne_federated.core.files import private_folder, write_atomic
from dafne_federated.core.json_record import read_record
from dafne_federated.core.model_file import read_model, write_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.new_run import make_plan, start_run
from dafne_federated.core.paired_changes import accepting
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.simulations.partition import Partition, PartitionSettings, divide
from dafne_federated.simulations.phantoms import POPULATIONS, write_phantoms
from dafne_federated.simulations.progress import Stages, epoch_note
from dafne_federated.simulations.simulated_privacy import require_accountant, with_simulated_privacy

log = logging.getLogger(__name__)

_FREE = {"threads"}  # may differ when a run goes on; the sites then take the new value


@dataclass(frozen=True)
class NetworkChoice:
    """What a base that is trained here looks like; None is chosen from the images."""

    size: int | None = None
    resolution: float | None = None
    filters: tuple[int, ...] = (16, 32, 64, 128)
    strides: tuple[int, ...] = (2, 2, 2)


@dataclass(frozen=True)
class Simulation:
    """Everything that a simulation is started with.

    Attributes:
        run: Folder of the run.
        data: Folder of images; None draws phantom limbs.
        base: A `.model`, approved on this machine; None trains one.
        partition: How persons are divided.
        settings: How the federation trains.
        fit: How a base is trained from scratch.
        network: Its network.
        phantom_persons: Phantom persons in the base population and in each site.
        engine: ``inline`` or ``ray``.
        parallel: Sites at the same time, with Ray.
        local_only: Whether to train the baseline of each site alone.
        command: What a person typed.
        given: Names of the options that a person gave, which a run that goes on is held to;
            None for those that differ from their default.
    """

    run: Path
    data: Path | None = None
    base: Path | None = None
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    settings: RunSettings = field(default_factory=RunSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    network: NetworkChoice = field(default_factory=NetworkChoice)
    phantom_persons: tuple[int, int] = (10, 8)
    engine: str = "inline"
    parallel: int = 1
    local_only: bool = True
    command: str = ""
    given: frozenset[str] | None = None


class Prepared(BaseModel):
    """What a simulated run knows beyond any other run.

    Attributes:
        data: Folder of images.
        test: Names of the test cases by site; sites that take no part are among them.
        local_only: Whether each site is trained alone, too.
        options: What decided all this, by the names of flags.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path
    test: dict[str, tuple[str, ...]]
    local_only: bool
    options: dict[str, JsonValue]


def read_prepared(folder: RunFolder) -> Prepared:
    """Return what the run of a simulation was prepared with.

    Raises:
        RunError: This is not the run of a simulation, or its file is damaged.
    """
    return read_record(folder.path / "partition.json", Prepared, "the run of a simulation")


def prepare(simulation: Simulation, stages: Stages) -> RunFolder:
    """Divide the data, train a base if there is none, and make the run folder.

    Raises:
        DafneFederatedError: Something does not fit; as far as possible before training.
    """
    images, partition = _images(simulation, stages)
    _check(partition, images, simulation.settings)
    if simulation.base is None and not partition.base:
        msg = "no base: give a .model with --base, or persons to train one with --base-site"
        raise SettingsError(msg)
    with RunFolder(private_folder(simulation.run)).lock():
        return _make(simulation, images, partition, stages)


def check_same(simulation: Simulation, folder: RunFolder) -> None:
    """Refuse to go on with a run under other options than it was started with.

    Raises:
        SettingsError: An option that was given differs, with both values.
        RunError: This is not the run of a simulation.
    """
    info, now = folder.info(), _options(simulation)
    given = simulation.given
    if given is None:
        default = _options(Simulation(simulation.run))
        given = frozenset(name for name in now if now[name] != default[name])
    names = {name.replace("_", "-") for name in simulation.settings.model_fields_set} | given
    now |= simulation.settings.model_dump(mode="json", by_alias=True)
    was = read_prepared(folder).options | info.settings.model_dump(mode="json", by_alias=True)
    for name in sorted(names & now.keys() - _FREE):
        if now[name] != was.get(name):
            _refuse(name, json.dumps(was.get(name)), json.dumps(now[name]))
    if simulation.base is not None:
        digest = read_model(simulation.base).digest
        if digest != info.base_digest:
            _refuse("base", info.base_digest[:16], digest[:16])


def keep_site(run: Path, site: SiteSettings) -> None:
    """Write the settings of a site into the run folder ``run``."""
    write_atomic(run / "sites" / f"{site.name}.json", site.model_dump_json(indent=2).encode())


def _refuse(name: str, was: str, now: str) -> None:
    msg = f"this run was started with {name} {was}, got {now}; choose another --run folder"
    raise SettingsError(msg)


def _options(simulation: Simulation) -> dict[str, JsonValue]:
    """Return what decides who is where and how a base is made, by the names of flags."""
    chosen, network = simulation.partition, simulation.network
    return {
        "data": None if simulation.data is None else str(simulation.data.resolve()),
        "base-site": chosen.base_site,
        "base-persons": chosen.base_persons,
        "test-site": chosen.test_site,
        "sites": chosen.sites,
        "divide": chosen.divide,
        "sizes": None if chosen.sizes is None else list(chosen.sizes),
        "shares": list(chosen.shares),
        "without": {site: list(labels) for site, labels in sorted(chosen.without.items())},
        "phantom-persons": list(simulation.phantom_persons),
        "base-epochs": simulation.fit.epochs,
        "base-size": network.size,
        "base-resolution": network.resolution,
        "base-filters": list(network.filters),
        "base-strides": list(network.strides),
        "local-only": simulation.local_only,
    }


def _images(simulation: Simulation, stages: Stages) -> tuple[DataFolder, Partition]:
    settings, seed = simulation.partition, simulation.settings.seed
    data = simulation.data
    if data is None:
        data = simulation.run / "images"
        base_name, *others = POPULATIONS
        base_count, count = simulation.phantom_persons
        with stages.stage("Drawing phantom limbs", 1) as advance:
            counts = {base_name: base_count, **dict.fromkeys(others, count)}
            write_phantoms(data, counts, seed)
            advance("")
        if simulation.base is None and settings.base_site is None and not settings.base_persons:
            settings = replace(settings, base_site=base_name)
    images = open_folder(data)
    return images, divide(images.cases, settings, seed)


def _check(partition: Partition, images: DataFolder, settings: RunSettings) -> None:
    """Refuse what would only be noticed after hours of training."""
    require_accountant(settings)
    sites = partition.sites.values()
    if len(sites) < settings.min_sites:
        msg = f"expected at least min-sites {settings.min_sites} sites, got {len(sites)}"
        raise SettingsError(msg)
    persons = [{ref.person for ref in site.validation} for site in sites]
    accept, wanted = sum(len(accepting(own)) for own in persons), settings.min_persons
    if settings.gate == "validation" and not settings.reference and accept < wanted:
        msg = (
            "only validation persons can show that a state is better than the base, and every "
            f"other one of a site accepts: expected min-persons {wanted} who accept, got "
            f"{accept}; give more persons or a larger share for validation, name a "
            "reference folder, or take --gate none, which releases the last round without looking"
        )
        raise SettingsError(msg)
    partition.check_without(images.labels.values())
    for ref in _cases(partition):
        if not label_names(ref, images):
            msg = f"case {ref.name!r}: expected a label map or masks, got none; leave it out"
            raise DataError(msg)


def _check_labels(partition: Partition, images: DataFolder, labels: Iterable[str]) -> None:
    known = set(labels) | {f"{label}{side}" for label in labels for side in ("_L", "_R")}
    for ref in _cases(partition):
        names = label_names(ref, images)
        if known.isdisjoint(names):
            msg = f"case {ref.name!r}: expected labels of the model, {sorted(labels)}"
            raise DataError(f"{msg}, got {sorted(names)}")


def _cases(partition: Partition) -> list[CaseRef]:
    parts = [part for s in partition.sites.values() for part in (s.training, s.validation, s.test)]
    return [ref for part in (partition.base, *parts, partition.held_out) for ref in part]


def _clear_sites(run: Path) -> None:
    """Remove the sites of a start that was cut short; engines count the files."""
    for path in (run / "sites").glob("*.json"):
        if read_site(path).cache != _site_cache(run, path.stem):
            msg = f"{path}: not written by a simulation here; choose another --run folder"
            raise RunError(msg)
        path.unlink()


def _site_cache(run: Path, name: str) -> Path:
    return (run / "cache" / name).resolve()


def _make(
    simulation: Simulation, images: DataFolder, partition: Partition, stages: Stages
) -> RunFolder:
    run, settings = simulation.run, simulation.settings
    base = simulation.base or _train_base(simulation, images, partition, stages)
    file = read_model(base)
    model = RunningModel(file, Approvals())
    _check_labels(partition, images, model.labels)
    plan = make_plan(model, settings)
    approvals = Approvals(run / "approved-models.json")
    approvals.add(file, "approved by the person who started the simulation")
    _clear_sites(run)
    for name, cases in partition.sites.items():
        site = SiteSettings(
            name=name,
            data=images.path.resolve(),
            training=tuple(ref.name for ref in cases.training),
            validation=tuple(ref.name for ref in cases.validation),
            cache=_site_cache(run, name),
            bias_fields=_bias_fields(),
            approvals=approvals.path.resolve(),
            annotated=cases.annotated(model.labels),
            threads=settings.threads,
            device=settings.device,
            precision=settings.precision,
        )
        keep_site(run, with_simulated_privacy(site, settings))
    test = {name: tuple(ref.name for ref in cases.test) for name, cases in partition.sites.items()}
    for site_name in sorted({ref.site for ref in partition.held_out}):
        test[site_name] = tuple(ref.name for ref in partition.held_out if ref.site == site_name)
    prepared = Prepared(
        data=images.path.resolve(),
        test=test,
        local_only=simulation.local_only,
        options=_options(simulation),
    )
    write_atomic(run / "partition.json", prepared.model_dump_json(indent=2).encode())
    return start_run(run, base, file, plan, settings, simulation.command)


def _train_base(
    simulation: Simulation, images: DataFolder, partition: Partition, stages: Stages
) -> Path:
    # One person in five chooses the epoch; a single person leaves none to choose it.
    training, validation = split_persons(partition.base, (4, 1), simulation.settings.seed)
    cases = [load_case(ref, images.labels) for ref in training]
    held_out = [load_case(ref, images.labels) for ref in validation]
    choice = simulation.network
    spec = propose_spec(
        [*cases, *held_out],
        list(images.labels.values()),
        choice.size,
        choice.resolution,
        choice.filters,
        choice.strides,
    )
    cache = BiasFieldCache(_bias_fields())
    timestamp = 1_700_000_000  # the base of a simulation is older than any release
    with (
        stages.stage("Preparing base images", len(cases) + len(held_out)) as prepared,
        stages.stage("Training the base", simulation.fit.epochs) as trained,
    ):
        file, fit = train_base(
            spec,
            cases,
            held_out,
            images.name or "Base",
            simulation.fit,
            timestamp,
            cache,
            lambda: prepared(""),
            lambda _epoch, loss, dice: trained(epoch_note(loss, dice)),
        )
    log.info("base: best epoch %d, validation Dice %s", fit.best_epoch, fit.best_dice)
    path = simulation.run / "trained-base.model"
    Approvals().add(write_model(file, path), "trained on this machine by a simulation")
    return path


def _bias_fields() -> Path:
    """One folder for all simulations of this person: the same image is corrected once."""
    return (home_folder() / "bias-fields").resolve()
