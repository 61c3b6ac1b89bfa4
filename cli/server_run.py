"""`dafne-federated server run`, `resume`, `stop` and `status`: the runs of a coordinator."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dafne_federated.cli.printable import printable
from dafne_federated.core.errors import RunError
from dafne_federated.core.methods import METHODS
from dafne_federated.core.metrics import mean
from dafne_federated.core.run_folder import RoundLine, RunFolder
from dafne_federated.core.settings import read_settings
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_processes import require_running
from dafne_federated.server.deployment_runs import Event, is_finished, require_no_other
from dafne_federated.server.generation import (
    GenerationInfo,
    check_continuous,
    is_generation,
    make_generation,
)
from dafne_federated.server.run_following import follow

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the coordinator.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def run(
    folder: Folder,
    base: Annotated[Path, typer.Option(help="Base .model, approved on this machine.")],
    name: Annotated[str, typer.Option(help="Name of the run; by default date and time.")] = "",
    settings: Annotated[
        Path | None, typer.Option(help="TOML with the training settings of simulate.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the federation. [5]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Local epochs in a round. [4]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam. [0.003]")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGY_TABLE)}. By default product.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(METHODS)}. By default lora.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank pairs. [4]")] = None,
    min_sites: Annotated[int | None, typer.Option(help="Without so many no round. [2]")] = None,
    deadline: Annotated[float | None, typer.Option(help="Of a round, seconds. [3600]")] = None,
    wait: Annotated[float | None, typer.Option(help="For the sites, seconds. [300]")] = None,
    seed: Annotated[int | None, typer.Option(help="All randomness follows from it. [1]")] = None,
    continuous: Annotated[
        bool, typer.Option("--continuous", help="Go on: a version whenever sites have new cases.")
    ] = False,
    ask_every: Annotated[
        float, typer.Option(help="With continuous: seconds between questions for new cases.")
    ] = 600.0,
    quiet: Quiet = False,
) -> None:
    """Run a federation with the sites that are online; what other settings there are, --settings.

    The exit status is 0 only if the run came to its end. A base that a site has not approved
    goes to that site to be looked at; once it is approved there, resume the run. With
    --continuous it goes on until it is stopped; a new generation is such a run with a release as
    its --base.

    Example: dafne-federated server run coordinator --base Thigh.model --rounds 5
    """
    flags = {
        "rounds": rounds, "epochs": epochs, "learning-rate": learning_rate, "strategy": strategy,
        "method": method, "rank": rank, "min-sites": min_sites, "deadline": deadline,
        "wait": wait, "seed": seed,
    }  # fmt: skip
    chosen = read_settings(settings, **flags)
    if continuous:
        check_continuous(chosen)
    opened = ServerFolder(folder)
    path = opened.run_path(name or f"{datetime.now():%Y%m%d-%H%M%S}")
    require_running(opened)

    require_no_other(opened, RunFolder(path))  # before anything is made or approved

    from dafne_federated.core.approvals import Approvals
    from dafne_federated.core.backend import prepare_backend
    from dafne_federated.core.model_file import read_model
    from dafne_federated.core.model_runtime import RunningModel
    from dafne_federated.core.new_run import make_plan, start_run

    if (path / "run.json").exists():
        msg = f"there is a run {path.name!r} already; resume it, or choose another --name"
        raise RunError(msg)
    prepare_backend(chosen.threads, "cpu")  # only the network's layers are looked at
    model = read_model(base)
    plan = make_plan(RunningModel(model, Approvals()), chosen)
    command = shlex.join(["dafne-federated", *sys.argv[1:]])
    started = start_run(path, base, model, plan, chosen, command)
    if continuous:
        make_generation(started, GenerationInfo(every=ask_every))
    _follow(opened, started, quiet)


def resume(folder: Folder, name: Run, quiet: Quiet = False) -> None:
    """Go on with a run after its last finished round, or follow it where it is under way.

    It ends in the same bits.

    Example: dafne-federated server resume coordinator first
    """
    opened = ServerFolder(folder)
    require_running(opened)
    found = RunFolder(opened.run_path(name))
    found.info()  # say now that there is no such run
    if is_finished(found):
        _print_result(found)
        return
    _follow(opened, found, quiet)


def _follow(folder: ServerFolder, run: RunFolder, quiet: bool) -> None:
    print(f"run:    {run.path}", flush=True)
    try:
        with _progress(run, quiet) as show:
            for event in follow(folder, run):
                show(event)
    except KeyboardInterrupt:
        print("The run goes on; 'dafne-federated server resume' follows it again.")
        raise typer.Exit(130) from None
    _print_result(run)


def _print_result(run: RunFolder) -> None:
    result = run.result()
    print(f"{'Released' if result.released else 'Nothing released'}: {result.reason}")
    if result.released:
        print(f"model:  {run.release / result.release}")
        print(f"digest: {result.release_digest}")
        print(f"content digest: {result.content_digest}")
    from dafne_federated.simulations.report import write_report

    print(f"report: {write_report(run)}")


@contextmanager
def _progress(run: RunFolder, quiet: bool) -> Iterator[Callable[[Event], None]]:
    from dafne_federated.simulations.progress import Stages

    goes_on = is_generation(run)  # which has no end to show progress towards
    left = run.info().settings.rounds + 1 - len(run.rounds())
    with Stages(quiet or goes_on) as stages, stages.stage("Federated rounds", left) as advance:

        def show(event: Event) -> None:
            if line := event_line(run, event):
                print(printable(line), flush=True)
            if event["event"] == "round finished":
                advance("")

        yield show


def event_line(run: RunFolder, event: Event) -> str:
    """Return what to tell people of an event; empty for what they need not hear."""
    kind = event["event"]
    if kind == "members":
        away = "".join(f"; {name} not: {why}" for name, why in event["declined"].items())
        return f"sites:  {', '.join(event['sites']) or 'none'}{away}"
    if kind == "not used":
        return f"round {event['round']}: {event['site']} not used: {event['reason']}"
    if kind == "lost":
        return f"{event['reason']}"
    if kind == "new cases":
        found = ", ".join(f"{name} {count}" for name, count in event["sites"].items())
        return f"new cases: {found or 'none'}"
    if kind in ("no version", "version dropped"):
        return f"{kind}: {event.get('reason') or event['version']}"
    if kind == "version begun":
        return f"version {event['version']}: {', '.join(event['sites'])} train"
    if kind == "version finished":
        word = "released" if event["released"] else "nothing released"
        return f"version {event['version']}: {word}: {event['reason']}"
    if kind == "round finished":
        return round_line(run.rounds()[int(event["round"]) - 1])
    return ""


def round_line(line: RoundLine) -> str:
    """Return a round in one line; the Dice is of what the sites were sent in it."""
    used = [name for name, site in line.sites.items() if site.status == "ok"]
    dice = mean([mean(list(site.dice.values())) for site in line.sites.values() if site.dice])
    up = sum(site.bytes_up for site in line.sites.values()) / 2**20
    down = sum(site.bytes_down for site in line.sites.values()) / 2**20
    return (
        f"round {line.round}: {len(used)} of {len(line.sites)} sites, "
        f"mean Dice {'-' if dice is None else f'{dice:.3f}'}, "
        f"{down:.2f} MiB down, {up:.2f} MiB up, {line.seconds:.0f} s"
    )
