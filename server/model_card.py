"""The card of a release: what it is for, what it was made from, how good it is, where it ends.

For the physicians who are asked to use it, as a page, and for programs, as JSON. The page loads
nothing and runs nothing.

Source:
    The headings are those of Mitchell et al. 2019, https://arxiv.org/abs/1810.03993.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dafne_federated.core.gate_decision import GateDecision
from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.page import page_environment
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunInfo, RunResult
from dafne_federated.server.acceptance import INTERVAL_FROM
from dafne_federated.server.continuation import Absent, Continuation

CARD_PAGE = "model-card.html"
CARD_DATA = "model-card.json"


class CardSite(BaseModel):
    """What one site gave.

    Attributes:
        site: Its name.
        training_cases: Cases that it trained on; 0 for one that only measured.
        earlier_cases: Those that it trained on for the version that this one started from.
        choose: Validation persons who chose the round.
        accept: Validation persons who accepted it.
        lacks: Labels that nobody annotated there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str
    training_cases: int
    earlier_cases: int
    choose: int
    accept: int
    lacks: tuple[str, ...]


class CardDice(BaseModel):
    """Mean Dice of one label over all validation persons of one site, from the start on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    site: str
    label: str
    base: float | None
    release: float | None


class ModelCard(BaseModel):
    """All that the card says; see the page for the words around it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    version: int
    date: str
    description: str
    modality: str
    labels: tuple[str, ...]
    orientation: str
    intended_use: tuple[str, ...]
    base_name: str
    base_version: int
    start: str
    digests: dict[str, str]
    sites: tuple[CardSite, ...]
    method: dict[str, Any]
    gate: dict[str, Any]
    reason: str
    decision: GateDecision | None
    dice: tuple[CardDice, ...]
    limits: tuple[str, ...]


def model_card(
    info: RunInfo,
    plan: AdaptationPlan,
    rounds: list[RoundLine],
    result: RunResult,
    base: ModelFile,
    model: ModelFile,
    continued: Continuation | None = None,
) -> ModelCard:
    """Return the card of a release.

    Args:
        info: What the run was started with.
        plan: What was trained.
        rounds: Its rounds.
        result: How it ended.
        base: The base.
        model: The release.
        continued: What it takes over, if it is a version of a federation that goes on.
    """
    earlier = continued.contained if continued else {}
    start = "the version that it started from" if earlier else "the base"
    settings, told = info.settings, model.metadata.get("info")
    about: Mapping[str, Any] = told if isinstance(told, dict) else {}
    known = model.metadata["federated"]
    return ModelCard(
        name=str(model.metadata.get("model_name") or info.base_name),
        version=model.timestamp_id,
        date=str(known["date"]),
        description=str(about.get("Description", "")),
        modality=str(about.get("Modality", "")),
        labels=plan.labels,
        orientation=str(model.metadata.get("orientation") or ""),
        intended_use=_intended_use(plan),
        base_name=info.base_name,
        base_version=base.timestamp_id,
        start=start,
        digests={
            "release": model.digest,
            "release without times": model.content_digest,
            "base": info.base_digest,
            "plan": info.plan_digest,
        },
        sites=_sites(rounds, result, earlier),
        method={
            key: known[key]
            for key in (
                *("method", "rank", "strategy", "robust", "rounds", "epochs_per_round", "sites"),
                *("training_cases", "wire", "statistics", "class_weights"),
                *("version", "earlier_sites", "earlier_training_cases"),
            )
            if key in known
        }
        | {"privacy": settings.privacy, "run": info.run, "software": info.versions},
        gate={
            "gate": settings.gate,
            "margin": settings.margin,
            "confidence": settings.confidence,
            "min_persons": settings.min_persons,
            "interval_from": INTERVAL_FROM,
        },
        reason=result.reason,
        decision=result.decision,
        dice=_dice(result),
        limits=_limits(info, plan, rounds, result, start),
    )


def card_page(card: ModelCard) -> str:
    """Return the card as a page of its own."""
    environment = page_environment(Path(__file__).parent)
    environment.filters |= {
        "three": lambda value: "\u2013" if value is None else f"{value:.3f}",
        "signed": lambda v: "\u2013" if v is None else f"{v:+.3f}".replace("-", "\u2212"),
        "day": lambda value: f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d}",
    }
    return environment.get_template("model_card.html.jinja").render(card=card)


def _intended_use(plan: AdaptationPlan) -> tuple[str, ...]:
    return (
        f"A first outline of {', '.join(plan.labels)} in Dafne, which a trained person looks at "
        "and corrects in every slice.",
        "Images like those that the base was made for and the sites below contributed: same part "
        "of the body, same kind of sequence, same orientation.",
        "Research. Not a medical device; not for diagnosis, treatment, or use without a look.",
    )


def _sites(
    rounds: list[RoundLine], result: RunResult, earlier: Mapping[str, Absent]
) -> tuple[CardSite, ...]:
    number = result.round or 0
    found = []
    here = {name for line in rounds[: number + 1] for name in line.sites}
    for name in sorted(here | earlier.keys()):
        own = [line.sites[name] for line in rounds[: number + 1] if name in line.sites]
        used = [site.training_cases for site in own if site.training_cases and site.share > 0]
        found.append(
            CardSite(
                site=name,
                training_cases=used[-1] if used else 0,
                earlier_cases=earlier[name].cases if name in earlier else 0,
                choose=max((c.persons for s in own for c in s.choose.values()), default=0),
                accept=max((c.persons for s in own for c in s.accept.values()), default=0),
                lacks=own[-1].lacks if own else earlier[name].lacks,
            )
        )
    return tuple(found)


def _dice(result: RunResult) -> tuple[CardDice, ...]:
    return tuple(
        CardDice(
            site=site,
            label=label,
            base=result.base_dice.get(site, {}).get(label),
            release=value,
        )
        for site, labels in sorted(result.dice.items())
        for label, value in labels.items()
    )


def _limits(
    info: RunInfo, plan: AdaptationPlan, rounds: list[RoundLine], result: RunResult, start: str
) -> tuple[str, ...]:
    said = []
    if result.decision is None:
        said.append("It was released without a gate: nobody measured whether it is better.")
    else:
        judged = {line.label: line for line in result.decision.lines if not line.site}
        if unknown := [label for label in plan.labels if label not in judged]:
            said.append(f"No validation person has {', '.join(unknown)}: not judged.")
        if few := [label for label, line in judged.items() if line.lower is None]:
            said.append(
                f"Fewer than {INTERVAL_FROM} of these persons have {', '.join(few)}: there the "
                "mean alone was looked at, and chance may hide a fall."
            )
    said += [
        f"Measured at the {len(result.dice)} sites that took part; on scanners, sequences, "
        "diseases and ages that they do not have, nobody knows.",
        f"Means over persons: single persons can be worse than with {start}.",
        "What the base was trained on is known only as far as its own makers say.",
    ]
    if info.settings.privacy == "none":
        said.append(
            "No noise hides who was trained on; whoever has the model could try to find out."
        )
    if any(site.lacks for line in rounds for site in line.sites.values()):
        said.append("Not every site annotated every label; see the table of sites.")
    return tuple(said)
