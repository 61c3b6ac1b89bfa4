"""From the rounds of a run to a released `.model`, or to the reason why there is none."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dafne_federated.core.files import sha256, write_atomic
from dafne_federated.core.gate_decision import GateDecision
from dafne_federated.core.merged_model import adapted_model, release_name
from dafne_federated.core.metrics import mean
from dafne_federated.core.model_file import ModelFile, parse_model, write_model
from dafne_federated.core.paired_changes import Changes
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.signed_release import ReleaseManifest, sign
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.server.acceptance import decide
from dafne_federated.server.continuation import Continuation, continuation
from dafne_federated.server.model_card import CARD_DATA, CARD_PAGE, card_page, model_card
from dafne_federated.server.reference_folder import reference_changes

Scores = dict[str, dict[str, float | None]]


def release(folder: RunFolder, key: Path | None = None) -> RunResult:
    """Choose the best state that loses nothing, fold it into the base, and write the release.

    Which one that is, and whether it may be released, is decided in ``acceptance.py``. Beside the
    model lie Dafne's side-car, a model card, and the list of all of them.

    Args:
        folder: The run.
        key: Signs the list; without one the release is not signed.
    """
    info, plan, rounds = folder.info(), folder.plan(), folder.rounds()
    base_dice = base_scores(folder)
    reference = reference_changes(folder) if info.settings.reference else None
    continued = continuation(folder)
    from_release = continued is not None and continued.from_release
    number, reason, decision = choose_round(rounds, info.settings, reference, from_release)
    if number is None:
        result = RunResult(
            released=False,
            reason=reason,
            round=None,
            base_dice=base_dice,
            dice=scores(rounds[-1]),
            decision=decision,
        )
        folder.finish(result)
        return result
    base = parse_model(folder.base_bytes())
    model = adapted_model(base, plan, folder.state_after(number), info.created)
    told = provenance(info, plan, rounds, number, continued)
    model = replace(model, metadata={**model.metadata, "federated": told})
    name = release_name(base, info.created)
    written = write_model(model, folder.release / f"{name}.model")
    result = RunResult(
        released=True,
        reason=reason,
        round=number,
        release=f"{name}.model",
        release_digest=written.digest,
        content_digest=written.content_digest,
        base_dice=base_dice,
        dice=scores(rounds[number]),
        decision=decision,
    )
    family, _, _ = name.partition("_")  # Dafne keeps one side-car for all versions of a name
    card = model_card(info, plan, rounds, result, base, written, continued)
    texts = {
        f"{family}.json": json.dumps(sidecar_metadata(written), indent=4),
        CARD_DATA: card.model_dump_json(indent=2),
        CARD_PAGE: card_page(card),
    }
    for file, text in texts.items():
        write_atomic(folder.release / file, text.encode())
    manifest = ReleaseManifest(
        model=result.release,
        files={result.release: written.digest}
        | {file: sha256(text.encode()) for file, text in sorted(texts.items())},
        name=family,
        version=written.timestamp_id,
        run=info.run,
        round=number,
        base_digest=info.base_digest,
        content_digest=written.content_digest,
    )
    sign(folder.release, manifest, key)
    folder.finish(result)
    return result


def choose_round(
    rounds: list[RoundLine],
    settings: RunSettings,
    reference: Callable[[int], Sequence[Changes]] | None = None,
    from_release: bool = False,
) -> tuple[int | None, str, GateDecision | None]:
    """Return the round to release, or None; why in words; and what the gate decided, if asked.

    Args:
        rounds: All lines; the last one evaluates the final state.
        settings: Those of the run.
        reference: Gives the changes in the coordinator's own folder; see ``acceptance.decide``.
        from_release: Whether the run started from an earlier release.
    """
    if not STRATEGY_TABLE[settings.strategy].common:
        words = (
            f"with strategy {settings.strategy!r} there is no model for everybody: each site has "
            "its own, in its cache"
        )
        return None, words, None
    if settings.gate == "none":
        words = "the last round, released without a gate as the settings say"
        return rounds[-1].round - 1, words, None
    number, decision = decide(rounds, settings, reference, from_release)
    if number is None:
        return None, f"no state passed the gate: {decision.reason}", decision
    chosen = any(site.choose for line in rounds for site in line.sites.values())
    words = f"round {number} has the largest gain in mean Dice in the persons who choose"
    if not chosen:
        words = f"round {number} is the last whole one, and no person chooses"
    if before := decision.looked_at[:-1]:
        words = f"round {number} is the next best: {_numbers(before)} was not accepted"
    words += (
        f"; in {decision.persons} others, who accept, the mean rises by {decision.change:.3f} and "
        "no label lost more than the margin"
    )
    if decision.base is not None:
        words += f"; nor against the base, from which it rises by {decision.base.change:.3f}"
    return number, words, decision


def _numbers(rounds: Sequence[int]) -> str:
    return " and ".join(f"round {number}" for number in rounds)


def provenance(
    info: RunInfo,
    plan: AdaptationPlan,
    rounds: list[RoundLine],
    number: int,
    continued: Continuation | None = None,
) -> dict[str, Any]:
    """Return how a release came about, as JSON values for the model's metadata."""
    cases = {  # of each site that was used, as it said in its last such round
        name: site.training_cases
        for line in rounds
        if line.trained and line.round <= number
        for name, site in line.sites.items()
        if site.training_cases > 0 and site.share > 0
    }
    return {
        "run": info.run,
        "base_sha256": info.base_digest,
        "base_name": info.base_name,
        "plan_sha256": info.plan_digest,
        "method": plan.method,
        "rank": plan.rank,
        "strategy": info.settings.strategy,
        "robust": info.settings.robust,
        "bad_sites": info.settings.bad_sites if info.settings.robust != "none" else 0,
        "sites_per_round": info.settings.sites_per_round,
        "wire": info.settings.wire,
        "statistics": info.settings.statistics,
        "class_weights": info.settings.class_weights,
        "optimiser": info.settings.optimiser,
        "proximal": info.settings.proximal,
        "server_optimiser": info.settings.server_optimiser,
        **_hiding(info.settings),
        "rounds": number,
        "epochs_per_round": info.settings.epochs,
        "sites": len(cases),
        "training_cases": sum(cases.values()),
        **_earlier(continued, cases),
        "software": info.versions,
        "date": datetime.fromtimestamp(info.created, UTC).date().isoformat(),
    }


def _earlier(continued: Continuation | None, cases: Mapping[str, int]) -> dict[str, Any]:
    """Return which version it is, and what it contains of sites that did not train for it."""
    if continued is None:
        return {}
    earlier = [own.cases for name, own in continued.contained.items() if name not in cases]
    return {
        "version": continued.version,
        "start_sha256": continued.start_digest,
        "earlier_sites": len(earlier),
        "earlier_training_cases": sum(earlier),
    }


def _hiding(settings: RunSettings) -> dict[str, Any]:
    """Return how noise hides whom; nothing where it hides nobody."""
    if settings.privacy == "none":
        return {}
    told = {"privacy": settings.privacy, "noise": settings.noise, "clip": settings.clip}
    rate = {"person_rate": settings.mechanism.rate} if settings.mechanism else {}
    return told | rate


def sidecar_metadata(model: ModelFile) -> dict[str, Any]:
    """Return the metadata as Dafne writes it beside a model.

    Source:
        ``get_metadata`` in ``dafne_dl.interfaces``: three fields are added.
    """
    return {
        **model.metadata,
        "dimensionality": str(model.dimensionality),
        "type": model.type,
        "can_incremental_learn": bool(model.functions.get("incremental_learn_function")),
    }


def base_scores(folder: RunFolder) -> Scores:
    """Return the Dice of the base by site and label.

    They are those of the first round, unless the sites received pooled statistics in it: then
    they measured the base before. A site that came later is not among them; the gate judges by
    its own comparison.
    """
    pooled = folder.pooled()
    if pooled is None or not pooled.moments:
        return scores(folder.rounds()[0])
    return {name: site.dice for name, site in sorted(pooled.sites.items()) if site.dice}


def scores(line: RoundLine) -> Scores:
    """Return the Dice of the state that sites received in a round, by site and label."""
    return {name: site.dice for name, site in sorted(line.sites.items()) if site.dice}


def mean_score(dice: Scores) -> float | None:
    """Return the mean over sites of each site's mean over labels."""
    return mean([mean(list(labels.values())) for labels in dice.values()])
