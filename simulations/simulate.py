"""The main job: many sites on one machine, from images and a base to a release and a report."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dafne_federated.client.site import Site
from dafne_federated.client.site_settings import SiteSettings, read_site
from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.base_training import FitSettings, propose_spec, train_base
from dafne_federated.core.dataset import CaseRef, DataFolder, load_case, open_folder, split_persons
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.evaluation import known_masks, label_map
from dafne_federated.core.files import write_atomic
from dafne_federated.core.metrics import Agreement, agreement, mean
from dafne_federated.core.model_file import read_model, write_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.new_run import make_plan, start_run
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.run_folder import RunFolder, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State
from dafne_federated.core.volumes import orientation
from dafne_federated.server.rounds import first_state
from dafne_federated.simulations.comparison import persons_to_show
from dafne_federated.simulations.inline_engine import run_inline
from dafne_federated.simulations.local_only import train_alone
from dafne_federated.simulations.partition import Partition, PartitionSettings, divide
from dafne_federated.simulations.phantoms import POPULATIONS, write_phantoms
from dafne_federated.simulations.progress import Stages, epoch_note
from dafne_federated.simulations.ray_engine import run_ray
from dafne_federated.simulations.report import write_report
from dafne_federated.simulations.test_results import (
    Overlay,
    TestRow,
    save_overlays,
    save_test_rows,
)

log = logging.getLogger(__name__)


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


def simulate(simulation: Simulation, stages: Stages) -> RunFolder:
    """Run a whole simulation and return its folder, report included.

    Raises:
        DafneFederatedError: In one line, what does not fit and what to do.
    """
    prepare_backend(simulation.settings.threads, simulation.settings.device)
    if (simulation.run / "run.json").exists():
        folder = RunFolder(simulation.run)
    else:
        folder = _prepare(simulation, stages)
    sites = site_folders(folder)
    with stages.federation(folder, len(sites)):
        _run_engine(simulation, folder, len(sites))
    result = folder.result()
    _test(simulation, folder, result, sites, stages)
    write_report(folder)
    return folder


def site_folders(folder: RunFolder) -> dict[str, SiteSettings]:
    """Return the sites of a simulated run by name."""
    found = [read_site(path) for path in sorted((folder.path / "sites").glob("*.json"))]
    return {site.name: site for site in found}


def _prepare(simulation: Simulation, stages: Stages) -> RunFolder:
    data = simulation.data
    partition_settings = simulation.partition
    if data is None:
        data = simulation.run / "images"
        base_name, *others = POPULATIONS
        base_count, count = simulation.phantom_persons
        with stages.stage("Drawing phantom limbs", 1) as advance:
            write_phantoms(
                data,
                {base_name: base_count, **dict.fromkeys(others, count)},
                simulation.settings.seed,
            )
            advance("")
        if simulation.base is None and partition_settings.base_site is None:
            partition_settings = PartitionSettings(
                base_site=base_name, shares=partition_settings.shares
            )
    images = open_folder(data)
    partition = divide(images.cases, partition_settings, simulation.settings.seed)
    base = simulation.base or _train_base(simulation, images, partition, stages)
    file = read_model(base)
    model = RunningModel(file, Approvals())
    plan = make_plan(model, simulation.settings)
    folder = start_run(simulation.run, base, file, plan, simulation.settings, simulation.command)
    approvals = Approvals(folder.path / "approved-models.json")
    approvals.add(file, "approved by the person who started the simulation")
    for name, cases in partition.sites.items():
        site = SiteSettings(
            name=name,
            data=data.resolve(),
            training=tuple(ref.name for ref in cases.training),
            validation=tuple(ref.name for ref in cases.validation),
            cache=(folder.path / "cache" / name).resolve(),
            approvals=approvals.path.resolve(),
            threads=simulation.settings.threads,
            device=simulation.settings.device,
        )
        write_atomic(
            folder.path / "sites" / f"{name}.json", site.model_dump_json(indent=2).encode()
        )
    test = {name: [ref.name for ref in cases.test] for name, cases in partition.sites.items()}
    held_out = sorted({ref.site for ref in partition.held_out})
    test |= {s: [ref.name for ref in partition.held_out if ref.site == s] for s in held_out}
    chosen = {"data": str(data.resolve()), "test": test}
    write_atomic(folder.path / "partition.json", json.dumps(chosen, indent=2).encode())
    return folder


def _train_base(
    simulation: Simulation, images: DataFolder, partition: Partition, stages: Stages
) -> Path:
    if not partition.base:
        msg = "no base: give a .model with --base, or persons to train one with --base-site"
        raise SettingsError(msg)
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
    cache = BiasFieldCache(simulation.run / "cache" / "base")
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


def _run_engine(simulation: Simulation, folder: RunFolder, sites: int) -> None:
    if len(folder.rounds()) > simulation.settings.rounds and (folder.path / "result.json").exists():
        return
    if simulation.engine == "inline":
        run_inline(folder.path, sites)
        return
    device = prepare_backend(simulation.settings.threads, simulation.settings.device)
    gpus = 1.0 / simulation.parallel if device.name.startswith("GPU") else 0.0
    run_ray(folder.path, sites, device.threads, simulation.parallel, gpus)


def _test(
    simulation: Simulation,
    folder: RunFolder,
    result: RunResult,
    sites: Mapping[str, SiteSettings],
    stages: Stages,
) -> None:
    """Measure base, local and federated states on persons that nobody trained on."""
    info, plan = folder.info(), folder.plan()
    start = first_state(info, plan)
    final = folder.state_after(result.round or info.settings.rounds)
    chosen = json.loads((folder.path / "partition.json").read_text(encoding="utf-8"))
    images = open_folder(Path(chosen["data"]))
    refs = {ref.name: ref for ref in images.cases}
    alone: dict[str, State] = {}
    if simulation.local_only:
        with stages.stage("Each site alone", len(sites) * info.settings.rounds) as advance:
            for name, settings in sites.items():
                alone[name] = train_alone(Site(settings), plan, start, info.settings, advance)
    rows: list[TestRow] = []
    overlays: list[Overlay] = []
    total = sum(len(names) for names in chosen["test"].values())
    any_site = Site(next(iter(sites.values())))
    with stages.stage("Testing on unseen persons", total) as advance:
        for name, cases in chosen["test"].items():
            # At a site that took no part, each local model is a guest: their mean is shown.
            local = [alone[name]] if name in alone else list(alone.values())
            arms: dict[str, list[State]] = {"base": [start], "federated": [final]}
            arms |= {"local only": local} if local else {}
            bench = Site(sites[name]) if name in sites else any_site
            for case_name in cases:
                found, overlay = _test_case(bench, plan, refs[case_name], images, name, arms)
                rows += found
                overlays.append(overlay)
                advance(case_name)
    shown = persons_to_show(rows)
    save_test_rows(folder, rows)
    save_overlays(folder, [o for o in overlays if (o.site, o.person) in shown])


def _test_case(
    bench: Site,
    plan: AdaptationPlan,
    ref: CaseRef,
    images: DataFolder,
    site: str,
    arms: Mapping[str, Sequence[State]],
) -> tuple[list[TestRow], Overlay]:
    case = load_case(ref, images.labels)
    engine = bench.engine(plan, plan.rank)
    truth = known_masks(engine.model, case)
    marked = np.sum([mask.sum(axis=(0, 1)) for mask in truth.values()], axis=0)
    index = int(np.argmax(marked))
    rows: list[TestRow] = []
    predictions: dict[str, NDArray[np.uint8]] = {}
    for arm, states in arms.items():
        measured: list[list[Agreement]] = []
        for state in states:
            engine.adapted.write(state)
            found = engine.model.apply(case, engine.adapted.predict, cache=bench.bias_fields())
            predictions[arm] = label_map(engine.model, found, index)
            measured.append(agreement(case.name, truth, found, case.spacing))
        for same in zip(*measured, strict=True):
            rows.append(
                TestRow(
                    arm=arm,
                    site=site,
                    person=ref.person,
                    case=ref.name,
                    label=same[0].label,
                    dice=mean([row.dice for row in same]),
                    hd95=mean([row.hd95 for row in same]),
                    volume_error=mean([row.volume_error for row in same]),
                )
            )
    overlay = Overlay(
        site=site,
        person=ref.person,
        case=ref.name,
        slice_index=index,
        image=case.image[..., index],
        truth=label_map(engine.model, truth, index),
        predictions=predictions,
        spacing=np.array(case.spacing[:2]),
        orientation="" if case.affine is None else orientation(case.affine)[:2],
    )
    return rows, overlay


def release_difference(folder: RunFolder, case: CaseRef, labels: Mapping[int, str]) -> float:
    """Return the largest difference between the released file and the adapted network.

    Both networks see the prepared slices of one case; the figure is the largest difference of
    any probability.
    """
    info, plan, result = folder.info(), folder.plan(), folder.result()
    approvals = Approvals(folder.path / "approved-models.json")
    model = RunningModel(read_model(folder.base), approvals)
    adapted = AdaptedNetwork(model.network, plan)
    adapted.write(folder.state_after(result.round or info.settings.rounds))
    released_file = read_model(folder.release / result.release)
    approvals.add(released_file, "released by this simulation")
    released = RunningModel(released_file, approvals)
    slices = released.prepare(load_case(case, labels))
    if slices is None:
        return 0.0
    inputs = slices.inputs()[:4]
    after = np.asarray(released.network.predict_on_batch(inputs))
    return float(np.abs(after - adapted.predict(inputs)).max())
