"""Whether a site's data can be trained on with the bases that are approved there."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from dafne_federated.client.base_review import approved_models
from dafne_federated.client.labels_here import labels_here
from dafne_federated.client.site_checks import Check, failed, fine, warned
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.data_check import check_folder
from dafne_federated.core.dataset import load_case, open_folder
from dafne_federated.core.dry_run import Bench, dry_run, physical_memory_mib, process_start
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.findings import expectation_of
from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.settings import RunSettings

_BATCH = RunSettings().batch_size


def check_device(settings: SiteSettings) -> Check:
    """Return on what TensorFlow would run, asked in a process of its own."""
    advice = 'install the driver and TensorFlow\'s GPU libraries, or take device = "cpu"'
    try:
        with ProcessPoolExecutor(1, mp_context=process_start()) as pool:
            name = pool.submit(_device, settings.threads, settings.device).result()
    except DafneFederatedError as error:
        return failed("device", str(error), advice)
    except BrokenProcessPool:
        return failed("device", "TensorFlow cannot be loaded", "install this package again")
    return fine("device", name)


def check_training(settings: SiteSettings) -> Iterator[Check]:
    """Yield for each approved base whether the data fit, and what a step of training costs."""
    listed = len(Approvals(settings.approvals).entries())
    models = approved_models(settings)
    if not listed:
        yield _data(settings, None)
        advice = "look at what waits with 'site approvals', and decide with 'site approve'"
        yield warned("bases", "none is approved here, so that no run can take place", advice)
        return
    if not models:
        yield _data(settings, None)
        advice = "nothing now: it comes with the first run, and can then be checked"
        yield warned("bases", f"{listed} approved, whose bytes have not come yet", advice)
        return
    yield fine("bases", f"{listed} approved, {len(models)} of them here")
    for model in models:
        data = _data(settings, model)
        yield data
        if data.status != "fail":
            yield _step(settings, model)


def _data(settings: SiteSettings, model: ModelFile | None) -> Check:
    """Return whether the cases that take part can be read, and fit a base."""
    name = "data" if model is None else f"data for {_title(model)}"
    ask = "tell those who drew the masks; 'dafne-federated check-data' shows each case"
    try:
        folder = open_folder(settings.data)
        chosen = set(settings.training) | set(settings.validation)
        used = tuple(ref for ref in folder.cases if ref.name in chosen)
        if absent := len(chosen) - len(used):
            advice = "correct training and validation in site.toml, or bring the images back"
            return failed(name, f"{absent} of {len(chosen)} cases are not in the folder", advice)
        if (cases := len(settings.training)) < max(1, settings.min_cases):
            advice = "name more cases as training in site.toml, or lower min-cases"
            return failed(name, f"{cases} training cases, too few to take part", advice)
        expected = None if model is None else expectation_of(model)
        here = labels_here(settings, expected.labels) if expected and expected.labels else None
        findings = check_folder(replace(folder, cases=used), expected, here=here)
    except OSError as error:
        advice = "give the site's user the right to read there, or correct 'data' in site.toml"
        return failed(name, f"{settings.data} cannot be read: {error.strerror}", advice)
    except DafneFederatedError as error:
        return failed(name, str(error), ask)
    counts = Counter(finding.severity for finding in findings)
    found = f"{len(used)} cases, {counts['error']} errors, {counts['warning']} warnings"
    first = next((one for one in findings if one.severity == "error"), None)
    if first is not None:
        where = f"{first.case}: " if first.case else ""
        return failed(name, f"{found}; {where}{first.what}", f"{first.advice}; {ask}")
    return warned(name, found, ask) if counts["warning"] else fine(name, found)


def _step(settings: SiteSettings, model: ModelFile) -> Check:
    """Return what one step of training on the site's own images costs."""
    name = f"step of {_title(model)}"
    try:
        with TemporaryDirectory(prefix="dafne-federated-") as scratch:
            bench = _bench(settings, model, Path(scratch))
            with ProcessPoolExecutor(1, mp_context=process_start()) as pool:
                plan = pool.submit(_plan, bench).result()
            done = dry_run(bench, plan)
    except BrokenProcessPool:
        advice = "most likely memory did not suffice: ask for more"
        return failed(name, "the process ended by itself", advice)
    except (DafneFederatedError, OSError) as error:
        return failed(name, str(error), "tell the coordinator which base this is, and this line")
    found = f"{done.step_seconds:.2f} s for {_BATCH} slices on {done.device}"
    if done.peak_mib is None:
        return fine(name, found)
    found += f", {done.peak_mib / 1024:.1f} GiB at most"
    memory = physical_memory_mib()
    if memory is not None and done.peak_mib > 0.8 * memory:
        return warned(name, found, "that is nearly all of this machine's memory: ask for more")
    return fine(name, found)


def _bench(settings: SiteSettings, model: ModelFile, scratch: Path) -> Bench:
    folder = open_folder(settings.data)
    here = labels_here(settings, expectation_of(model).labels)
    first = next(ref for ref in folder.cases if ref.name in settings.training)
    return Bench(
        model=settings.cache / "bases" / f"{model.digest}.model",
        case=here.case(load_case(first, folder.labels)),
        classification=settings.classification,
        batch_size=_BATCH,
        threads=settings.threads,
        device=settings.device,
        approvals=settings.approvals,
        scratch=scratch,
    )


def _plan(bench: Bench) -> AdaptationPlan:
    prepare_backend(bench.threads, bench.device)
    from dafne_federated.core.model_file import read_model
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.new_run import make_plan

    return make_plan(
        RunningModel(read_model(bench.model), Approvals(bench.approvals)), RunSettings()
    )


def _device(threads: int, device: str) -> str:
    return prepare_backend(threads, device).name


def _title(model: ModelFile) -> str:
    return f"{model.metadata.get('model_name') or 'base'} {model.digest[:8]}"
