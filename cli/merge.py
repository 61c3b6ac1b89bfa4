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
from dafne_federated.core.state import load_state
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.core.versions import versions
from dafne_federated.server.release import provenance


def merge(
    source: Annotated[Path, typer.Argument(help="A run folder, or a state file (.npz) of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new .model file.")],
    base: Annotated[
        Path | None, typer.Option(help="The base .model; a run folder has its own.")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", help="Round of a run folder; by default the last.")
    ] = None,
) -> None:
    """Fold adapters into their base and write a .model that Dafne opens.

    Folding needs neither the model's code nor TensorFlow, and there is no gate: a run's own
    release is in its folder.

    Example: dafne-federated merge runs/demo --round 3 -o Thigh_round3.model
    """
    check_output(output)
    told = None
    if source.is_dir():
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
        told = provenance(folder.info(), plan, folder.rounds(), number)
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
