"""`dafne-federated merge`: fold a run or a state file into its base."""

import time
import zipfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from dafne_federated.cli.output_file import check_output
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.merged_model import adapted_model
from dafne_federated.core.model_file import ModelFile, read_model, write_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import State, load_state, state_rank
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.core.versions import versions
from dafne_federated.server.continuation import continuation
from dafne_federated.server.release import provenance
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update


def merge(
    sources: Annotated[
        list[Path], typer.Argument(help="A run folder, or state files (.npz) of one plan.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .model file.")],
    base: Annotated[
        Path | None, typer.Option(help="The base .model; a run folder has its own.")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", help="Round of a run folder; by default the last.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of several states, such as 3,1; by default all the same.")
    ] = None,
) -> None:
    """Fold adapters into their base and write a .model that Dafne opens.

    Folding needs neither the model's code nor TensorFlow, and there is no gate: a run's own
    release is in its folder. Of several states the mean of what they do is folded.

    Example: dafne-federated merge runs/demo --round 3 -o Thigh_round3.model
    """
    check_output(output)
    told = None
    shares = _weights(weights, len(sources))
    source = sources[0]
    if len(sources) > 1:
        if base is None or number is not None:
            msg = "expected --base FILE and no --round with several state files"
            raise SettingsError(msg)
        plan, state = _mean(sources, shares)
    elif source.is_dir():
        folder = RunFolder(source)
        strategy = folder.info().settings.strategy
        if not STRATEGY_TABLE[strategy].common:
            msg = (
                f"with strategy {strategy!r} there is no model for everybody; give the newest "
                "state in 'personal' in the cache of a site, and --base"
            )
            raise SettingsError(msg)
        number = _trained_round(folder, number)
        plan, state = folder.plan(), folder.state_after(number)
        told = provenance(folder.info(), plan, folder.rounds(), number, continuation(folder))
        base = base or folder.base
    elif not zipfile.is_zipfile(source):
        msg = f"expected the folder of a run or a state file (.npz), got {str(source)!r}"
        raise SettingsError(msg)
    elif base is None or number is not None:
        got = "--round" if number is not None else "none"
        msg = f"expected --base FILE and no other option with a state file, got {got}"
        raise SettingsError(msg)
    else:
        plan, state = load_state(source)
    model = read_model(base)
    if model.digest != plan.base_digest:
        msg = (
            f"{base.name}: expected the base with digest {plan.base_digest[:16]}, "
            f"got {model.digest[:16]}"
        )
        raise SettingsError(msg)
    approvals = Approvals()
    if approved := approvals.allows(model.digest):
        check_output(approvals.path, replace=True)
    merged = adapted_model(model, plan, state, int(time.time()))
    told = told or _known_origin(model, plan)
    merged = replace(merged, metadata={**merged.metadata, "federated": told})
    written = write_model(merged, output)
    if approved:
        approvals.add(written, f"merged here from the approved {model.digest[:16]}")
    print(f"{output}  {written.digest}")


def _weights(text: str | None, count: int) -> list[int]:
    """Return one weight for each source."""
    given = ["1"] * count if text is None else text.split(",")
    if len(given) != count or not all(w.strip().isdecimal() and int(w) > 0 for w in given):
        msg = f"weights: expected {count} whole numbers above 0, one for each state, got {text!r}"
        raise SettingsError(msg)
    return [int(weight) for weight in given]


def _mean(sources: list[Path], weights: list[int]) -> tuple[AdaptationPlan, State]:
    """Return the mean of what states of one plan do, at their largest rank."""
    loaded = [load_state(path) for path in sources]
    plan = loaded[0][0]
    for path, (other, _) in zip(sources, loaded, strict=True):
        if other != plan:
            msg = f"{path.name}: expected a state of the plan of {sources[0].name}, got another"
            raise SettingsError(msg)
    rank = max(state_rank(plan, state) for _, state in loaded)
    updates = [
        Update(f"{number:04d}", state, weight)
        for number, ((_, state), weight) in enumerate(zip(loaded, weights, strict=True))
    ]
    return plan, STRATEGIES["product"](plan.model_copy(update={"rank": rank}), updates).state


def _trained_round(folder: RunFolder, chosen: int | None) -> int:
    """Return the chosen round, or the last one; the state of a run is that after training."""
    folder.info()  # is it a run at all
    trained = [line.round for line in folder.rounds() if line.trained]
    if not trained:
        msg = f"{folder.path}: expected a run with at least one finished round, got none"
        raise SettingsError(msg)
    if chosen is None:
        return trained[-1]
    if chosen not in trained:
        msg = f"round: expected one of {trained[0]} to {trained[-1]}, got {chosen}"
        raise SettingsError(msg)
    return chosen


def _known_origin(base: ModelFile, plan: AdaptationPlan) -> dict[str, Any]:
    """Return how a model came about, as far as a state file says; see ``provenance``."""
    return {
        "base_sha256": plan.base_digest,
        "base_name": str(base.metadata.get("model_name", "")),
        "plan_sha256": plan.digest,
        "method": plan.method,
        "rank": plan.rank,
        "software": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
