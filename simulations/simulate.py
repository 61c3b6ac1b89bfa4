"""The main job: many sites on one machine, from images and a base to a release and a report."""

from dafne_federated.client.site_settings import SiteSettings, read_site
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.errors import RunError
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.simulations.inline_engine import run_inline
from dafne_federated.simulations.preparation import (
    Simulation,
    check_same,
    keep_site,
    prepare,
    read_prepared,
)
from dafne_federated.simulations.progress import Stages
from dafne_federated.simulations.ray_engine import run_ray
from dafne_federated.simulations.report import write_report
from dafne_federated.simulations.simulated_privacy import keep_simulated_key
from dafne_federated.simulations.testing import measure


def simulate(simulation: Simulation, stages: Stages) -> RunFolder:
    """Run a whole simulation, or go on with one, and return its folder, report included.

    Raises:
        DafneFederatedError: In one line, what does not fit and what to do.
    """
    folder = RunFolder(simulation.run)
    settings = _open(simulation, folder, stages)
    keep_simulated_key(folder, settings)
    prepared, sites = read_prepared(folder), site_folders(folder)
    with stages.federation(folder, len(sites)):
        _run_engine(simulation, folder, settings, len(sites))  # locks the folder itself
    with folder.lock():
        measure(folder, prepared, sites, stages)
        write_report(folder)
    return folder


def site_folders(folder: RunFolder) -> dict[str, SiteSettings]:
    """Return the sites of a simulated run by name.

    Raises:
        RunError: There are none.
    """
    found = [read_site(path) for path in sorted((folder.path / "sites").glob("*.json"))]
    if not found:
        msg = f"{folder.path / 'sites'}: expected the sites of a simulation, got none"
        raise RunError(msg)
    return {site.name: site for site in found}


def _open(simulation: Simulation, folder: RunFolder, stages: Stages) -> RunSettings:
    """Prepare a new run, or check one that goes on; return its settings on this machine."""
    given = simulation.settings
    if not (folder.path / "run.json").exists():
        prepare_backend(given.threads, given.device)
        prepare(simulation, stages)
        return folder.info().settings
    check_same(simulation, folder)
    settings = folder.info().settings
    if "threads" in given.model_fields_set and given.threads != settings.threads:
        settings = settings.model_copy(update={"threads": given.threads})
        for site in site_folders(folder).values():
            keep_site(folder.path, site.model_copy(update={"threads": given.threads}))
    prepare_backend(settings.threads, settings.device)
    return settings


def _run_engine(
    simulation: Simulation, folder: RunFolder, settings: RunSettings, sites: int
) -> None:
    if len(folder.rounds()) > settings.rounds and (folder.path / "result.json").exists():
        return
    if simulation.engine == "inline":
        run_inline(folder.path, sites)
        return
    device = prepare_backend(settings.threads, settings.device)
    gpus = 1.0 / simulation.parallel if device.name.startswith("GPU") else 0.0
    run_ray(folder.path, sites, device.threads, simulation.parallel, gpus)
