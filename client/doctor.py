"""All that can be checked at a site before a run, one thing after the other."""

from collections.abc import Iterator

from dafne_federated.client.coordinator_check import check_coordinator
from dafne_federated.client.deployment_folder import SiteFolder
from dafne_federated.client.site_checks import Check, check_machine, failed, fine
from dafne_federated.client.training_check import check_device, check_training
from dafne_federated.client.work_starter import require_guard
from dafne_federated.core.errors import RunError, SettingsError


def check_site(folder: SiteFolder) -> Iterator[Check]:
    """Yield what is found, as soon as it is; nothing of a site changes by it.

    The base runs for the step of training, as in a run; only bases that were approved here do.
    """
    try:
        settings = folder.settings
        _ = folder.connection
    except SettingsError as error:
        yield failed("settings", str(error), "correct site.toml, or make it with 'site init'")
        return
    yield fine("settings", f"site {settings.name!r}, {len(settings.training)} cases to train on")
    try:
        require_guard()
        yield fine("guard", "in its place")
    except RunError as error:
        yield failed("guard", str(error), "install this package again")
    yield from check_coordinator(folder)
    yield from check_machine(settings, folder.path)
    device = check_device(settings)
    yield device
    if device.status != "fail":
        yield from check_training(settings)
