"""From the rounds of a run to a released `.model`, or to the reason why there is none."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from dafne_federated.core.files import write_atomic
from dafne_federated.core.merged_model import adapted_model, release_name
from dafne_federated.core.metrics import mean
from dafne_federated.core.model_file import ModelFile, parse_model, write_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, RunResult
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.strategy_table import STRATEGY_TABLE

Scores = dict[str, dict[str, float | None]]


def release(folder: RunFolder) -> RunResult:
    """Choose the best state that loses nothing, fold it into the base, and write the release.

    A state may be released if its mean Dice over sites and labels is above the base's, and no
    label of any site falls by more than ``margin``; among those the one with the best mean is
    taken. The Dice are those that the sites measured on their validation persons.
    """
    info, plan, rounds = folder.info(), folder.plan(), folder.rounds()
    base_dice = base_scores(folder)
    number, reason = choose_round(rounds, info.settings, base_dice)
    if number is None:
        result = RunResult(
            released=False,
            reason=reason,
            round=None,
            base_dice=base_dice,
            dice=scores(rounds[-1]),
        )
        folder.finish(result)
        return result
    base = parse_model(folder.base_bytes())
    model = adapted_model(base, plan, folder.state_after(number), info.created)
    model = replace(
        model, metadata={**model.metadata, "federated": provenance(info, plan, rounds, number)}
    )
    name = release_name(base, info.created)
    written = write_model(model, folder.release / f"{name}.model")
    sidecar = json.dumps(sidecar_metadata(written), indent=4)
    family, _, _ = name.partition("_")  # Dafne keeps one side-car for all versions of a name
    write_atomic(folder.release / f"{family}.json", sidecar.encode())
    result = RunResult(
        released=True,
        reason=reason,
        round=number,
        release=f"{name}.model",
        release_digest=written.digest,
        content_digest=written.content_digest,
        base_dice=base_dice,
        dice=scores(rounds[number]),
    )
    folder.finish(result)
    return result


def choose_round(
    rounds: list[RoundLine], settings: RunSettings, base: Scores | None = None
) -> tuple[int | None, str]:
    """Return the round to release, or None, and why in words.

    Args:
        rounds: All lines; the last one evaluates the final state.
        settings: Those of the run.
        base: Dice of the base; by default those of the first round.
    """
    if not STRATEGY_TABLE[settings.strategy].common:
        return None, (
            f"with strategy {settings.strategy!r} there is no model for everybody: each site has "
            "its own, in its cache"
        )
    if settings.gate == "none":
        return rounds[-1].round - 1, "the last round, released without a gate as the settings say"
    best, reasons = None, []
    base = scores(rounds[0]) if base is None else base
    for line in rounds[1:]:
        candidate, number = scores(line), line.round - 1
        if not line.whole:
            reasons.append(f"round {number}: sites of smaller rank measured a cut of it")
            continue
        if reason := why_not(base, candidate, settings.margin):
            reasons.append(f"round {number}: {reason}")
            continue
        before, after = (mean_score(scores) for scores in compared(base, candidate))
        gain = (after or 0.0) - (before or 0.0)
        if best is None or gain > best[0]:
            best = (gain, number)
    if best is None:
        return None, "no state passed the gate: " + "; ".join(reasons[-3:])
    return best[
        1
    ], f"round {best[1]} has the largest gain in mean Dice, and no label lost more than the margin"


def provenance(
    info: RunInfo, plan: AdaptationPlan, rounds: list[RoundLine], number: int
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
        "software": info.versions,
        "date": datetime.fromtimestamp(info.created, UTC).date().isoformat(),
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
    they measured the base before. A site that gave none there, because it was silent or came
    later, was asked for them beside those of a later round.
    """
    pooled, rounds = folder.pooled(), folder.rounds()
    if pooled is not None and pooled.moments:
        found = {name: site.dice for name, site in pooled.sites.items() if site.dice}
    else:
        found = scores(rounds[0]) if rounds else {}
    for line in rounds:
        for name, site in line.sites.items():
            if site.first_dice:
                found.setdefault(name, site.first_dice)
    return dict(sorted(found.items()))


def scores(line: RoundLine) -> Scores:
    """Return the Dice of the state that sites received in a round, by site and label."""
    return {name: site.dice for name, site in sorted(line.sites.items()) if site.dice}


def mean_score(dice: Scores) -> float | None:
    """Return the mean over sites of each site's mean over labels."""
    return mean([mean(list(labels.values())) for labels in dice.values()])


def compared(base: Scores, candidate: Scores) -> tuple[Scores, Scores]:
    """Return both without what was not measured for both, so that means are of the same."""
    both = {
        (site, label)
        for site, labels in base.items()
        for label, before in labels.items()
        if before is not None and candidate.get(site, {}).get(label) is not None
    }

    def kept(scores: Scores) -> Scores:
        return {
            site: {label: value for label, value in labels.items() if (site, label) in both}
            for site, labels in scores.items()
        }

    return kept(base), kept(candidate)


def why_not(base: Scores, candidate: Scores, margin: float) -> str:
    """Return why ``candidate`` must not be released, in words; empty if it may."""
    for site, labels in sorted(base.items()):
        for label, before in labels.items():
            after = candidate.get(site, {}).get(label)
            if before is not None and after is None:
                return f"{label} of {site} was measured for the base but not for this state"
            if before is not None and after is not None and after < before - margin:
                return f"{label} of {site} falls from {before:.3f} to {after:.3f}"
    for site, labels in sorted(candidate.items()):
        if site not in base and any(value is not None for value in labels.values()):
            return f"{site} has never measured the base, so nobody knows what it would lose"
    before, after = (mean_score(scores) for scores in compared(base, candidate))
    if before is None or after is None:
        return "no site measured a Dice for the base and for this state"
    if after <= before:
        return f"the mean Dice does not rise ({before:.3f} to {after:.3f})"
    return ""
