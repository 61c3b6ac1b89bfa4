"""A federated fit: the real server and sites in this process, one run folder for each."""

import os
import shutil
from pathlib import Path

from flwr.app import Context, Message

from dafne_federated.client.app import app as client_app
from dafne_federated.client.site_cache import SiteCache
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.model_file import read_model
from dafne_federated.core.new_run import make_plan, start_run
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import fold
from dafne_federated.core.training import slice_dice
from dafne_federated.simulations.benchmark_fits import POOLED, Fitted, pooled
from dafne_federated.simulations.benchmark_records import Point
from dafne_federated.simulations.benchmark_task import Stopwatch, Task
from dafne_federated.simulations.inline_engine import run_inline
from dafne_federated.simulations.preparation import keep_site


def fit_federated(task: Task, cell: str, persons: int, settings: RunSettings) -> Fitted:
    """Run a federation and keep the round with the best Dice on the sites' validation persons.

    All states are measured here after the run, on the same slices and in the same way as the
    epochs of other arms; the time of it counts as theirs does. A fit that was killed is made
    anew, so that its times are whole. The sites have the base and their slices at the start,
    and nothing that another fit left: what they compute or receive after that counts.

    Args:
        task: The task.
        cell: Name of the fit.
        persons: Persons per site, 0 for all.
        settings: Of the federation.
    """
    folder = RunFolder(task.folder.path / "runs" / cell)
    own = folder.path.with_name(f"{cell}-cache")
    for path in (folder.path, own):
        shutil.rmtree(path, ignore_errors=True)
    cache = SiteCache(own)
    task.site_slices(persons)  # so that they are prepared
    shutil.copytree(task.folder.cache / "slices", own / "slices", copy_function=os.link)
    cache.keep_base(task.base_path.read_bytes())
    _start(task, folder.path, own, persons, settings)
    times = _Times()
    run_inline(folder.path, len(task.division.sites), times)
    fitted = _measured(task, folder, persons, times)
    for path in (folder.path, own):
        shutil.rmtree(path)
    return fitted


class _Times:
    """The ClientApp, and how long it took for each round and node, in processor time."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        """Let the ClientApp handle a message."""
        watch = Stopwatch.started()
        reply = client_app(message, context)
        key = message.metadata.group_id, context.node_id
        self._seconds[key] = self._seconds.get(key, 0.0) + watch.cpu_seconds
        return reply

    def of_round(self, number: int) -> list[float]:
        """Return the times of the sites in a round; what was asked before counts as round 1."""
        groups = {group for group, _ in self._seconds}
        early = {group for group in groups if not group.isdecimal()}
        wanted = {str(number)} | (early if number == 1 else set())
        by_node: dict[int, float] = {}
        for (group, node), seconds in self._seconds.items():
            if group in wanted:
                by_node[node] = by_node.get(node, 0.0) + seconds
        return list(by_node.values())


def _start(task: Task, path: Path, cache: Path, persons: int, settings: RunSettings) -> None:
    base = read_model(task.base_path)
    for name, own in task.division.sites.items():
        site = SiteSettings(
            name=name,
            data=task.image_folder(name).path.resolve(),
            training=own.trained_on(persons),
            validation=(),
            cache=cache.resolve(),
            bias_fields=(task.folder.cache / "bias-fields").resolve(),
            approvals=task.approvals.path.resolve(),
            threads=settings.threads,
            device=settings.device,
            precision=settings.precision,
        )
        keep_site(path, site)
    plan = make_plan(task.model, settings)
    start_run(path, task.base_path, base, plan, settings, "dafne-federated benchmark")


def _measured(task: Task, folder: RunFolder, persons: int, times: _Times) -> Fitted:
    plan, settings = folder.plan(), folder.info().settings
    validation = pooled(list(task.site_validation().values()))
    unseen = validation.without_weights() if validation else None
    weights = task.model.file.weights
    best, kept, curve = -1.0, -1, []
    chosen = dict(weights)
    if unseen is not None:  # the base itself may be the best that there is
        task.write(weights)
        best = slice_dice(task.model.network.predict_on_batch, unseen)
    seconds = longest = sent = 0.0
    lines = [line for line in folder.rounds() if line.trained]
    for line in lines:
        now = fold(weights, plan, folder.state_after(line.round))
        task.write(now)
        watch = Stopwatch.started()
        dice = slice_dice(task.model.network.predict_on_batch, unseen) if unseen else None
        measuring, each = watch.cpu_seconds, times.of_round(line.round)
        seconds += sum(each) + measuring
        longest += max(each) + measuring
        sent += sum(site.bytes_down + site.bytes_up for site in line.sites.values()) / 1e6
        curve.append(
            Point(
                epoch=line.round * settings.epochs,
                seconds=seconds,
                longest=longest,
                megabytes=sent,
                dice=dice,
            )
        )
        if dice is None or dice > best:
            best, kept, chosen = dice or -1.0, len(curve) - 1, now
    task.write(weights)
    slices = sum(len(part) for part in task.site_slices(persons).values())
    return Fitted({POOLED: chosen}, tuple(curve), kept, plan.parameters, slices)
