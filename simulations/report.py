"""The report of a run: one HTML file that a clinician can read, with nothing to load or run."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment

from dafne_federated.core.errors import ModelFileError, RunError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.model_file import parse_model
from dafne_federated.core.page import page_environment
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunResult
from dafne_federated.core.strategy_table import STRATEGY_TABLE, round_rule
from dafne_federated.simulations.aggregation_words import aggregation_words
from dafne_federated.simulations.comparison import Comparison, Person, compare, persons_to_show
from dafne_federated.simulations.figures import Picture, dice_by_arm, dice_by_round, line_swatch
from dafne_federated.simulations.overlay_pictures import label_swatch, overlay_pictures, upright
from dafne_federated.simulations.release_check import load_release_check
from dafne_federated.simulations.simulated_privacy import site_privacy
from dafne_federated.simulations.test_results import Overlay, load_overlays, load_test_rows
from dafne_federated.simulations.traffic_figures import traffic_charts
from dafne_federated.simulations.verdict import counted, verdict


@dataclass(frozen=True)
class Traffic:
    """Bytes and seconds of the whole run.

    Attributes:
        down: Bytes to the sites.
        up: Bytes from the sites.
        whole: Bytes if the whole model had gone both ways each time; None where unknown.
        base: Bytes of the base, or None.
        seconds: Wall time of all rounds.
    """

    down: int
    up: int
    whole: int | None
    base: int | None
    seconds: float

    @property
    def share(self) -> float | None:
        """Bytes sent as a share of those of sending the whole model, or None."""
        return (self.down + self.up) / self.whole if self.whole else None


@dataclass(frozen=True)
class Refusal:
    """Why something of a site was not used.

    Attributes:
        site: Its name.
        when: Rounds in words.
        what: What happened, in words.
        reason: Why.
    """

    site: str
    when: str
    what: str
    reason: str


@dataclass(frozen=True)
class ScoreLine:
    """Validation Dice of one site and label, before and after.

    Attributes:
        site: Name of the site.
        label: Name of the label.
        cases: Validation cases behind the base's Dice.
        before: Dice of the base.
        after: Dice of the chosen, or of the last, state.
    """

    site: str
    label: str
    cases: int
    before: float | None
    after: float | None

    @property
    def gain(self) -> float | None:
        """By how much it rose."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class OverlayView:
    """One overlay with its words.

    Attributes:
        overlay: The slice.
        rank: ``lowest``, ``median``, ``highest``, ``only`` or empty.
        dice: Mean Dice of the person by arm.
        pictures: Of the truth and each arm.
        turned: Whether directions are known, so that it stands upright.
    """

    overlay: Overlay
    rank: str
    dice: dict[str, float]
    pictures: dict[str, Picture]
    turned: bool


@dataclass(frozen=True)
class Sizes:
    """Number of values: trained, and in the whole base (None where it cannot be read)."""

    trained: int
    base: int | None


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run from what lies in its folder, and return its path.

    What is not there yet (a release, tests, rounds) is left out with a note. The same folder
    gives the same bytes.

    Raises:
        RunError: This is not the folder of a run, or a file in it is damaged.
    """
    info, plan, rounds = folder.info(), folder.plan(), folder.rounds()
    result = folder.result() if (folder.path / "result.json").exists() else None
    rows = load_test_rows(folder)
    comparison = compare(rows, plan.labels) if rows else None
    base = folder.base.read_bytes() if folder.base.exists() else None
    overlays = _overlay_views(load_overlays(folder), comparison, persons_to_show(rows))
    sites = sorted({site for line in rounds for site in line.sites})
    chosen = result.round if result is not None else None
    curves = {site: dice_by_round(rounds, site, plan.labels, chosen) for site in sites}
    page = {
        "info": info,
        "plan": plan,
        "rounds": rounds,
        "result": result,
        "release_check": load_release_check(folder),
        "aggregation": aggregation_words(info, plan, rounds),
        "personal": bool(round_rule(info.settings.strategy, 1).personal),
        "local": STRATEGY_TABLE[info.settings.strategy].local,
        "comparison": comparison,
        "verdict": verdict(info, rounds, result, comparison),
        "sites": sites,
        "scores": _scores(rounds, result),
        "curves": {site: curve for site, curve in curves.items() if curve is not None},
        "bars": _bars(comparison) if comparison else {},
        "overlays": overlays,
        "refusals": _refusals(folder, rounds),
        "privacy": site_privacy(rounds),
        "lacks": {n: own.lacks for line in rounds for n, own in line.sites.items() if own.lacks},
        "traffic": _traffic(rounds, base),
        "charts": traffic_charts(rounds, len(base) if base else None) if rounds else [],
        "sizes": Sizes(_trained(plan), _parameters(base)),
        "line_legend": {label: line_swatch(n) for n, label in enumerate(plan.labels)},
        "label_legend": {label: label_swatch(n) for n, label in enumerate(plan.labels, start=1)},
        "settings": info.settings.model_dump(mode="json", by_alias=True),
    }
    html = report_environment().get_template("report.html.jinja").render(page)
    write_atomic(folder.report, html.encode())
    return folder.report


def report_environment() -> Environment:
    """Return what turns the templates beside this file into reports."""
    environment = page_environment(Path(__file__).parent)
    environment.filters |= {
        "three": lambda value: _number(value, "{:.3f}"),
        "signed": lambda value: _number(value, "{:+.3f}"),
        "one": lambda value: _number(value, "{:.1f}"),
        "signed_one": lambda value: _number(value, "{:+.1f}"),
        "megabytes": _megabytes,
        "seconds": _seconds,
        "percent": lambda value: _number(None if value is None else 100 * value, "{:.3g}\u202f%"),
        "thousands": lambda value: f"{value:,}".replace(",", "\u202f"),
        "day": lambda value: datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "counted": counted,
    }
    return environment


def _bars(comparison: Comparison) -> dict[str, Picture]:
    tested = [site for site, line in comparison.site_lines.items() if line.means]
    return {site: dice_by_arm(comparison, site) for site in tested}


def _overlay_views(
    overlays: Sequence[Overlay], comparison: Comparison | None, ranks: dict[Person, str]
) -> list[OverlayView]:
    """Return overlays from the person with the lowest Dice to the one with the highest."""
    scores = comparison.persons if comparison else {}
    views = []
    for overlay in overlays:
        person = overlay.site, overlay.person
        views.append(
            OverlayView(
                overlay=overlay,
                rank=ranks.get(person, ""),
                dice=scores.get(person, {}),
                pictures=overlay_pictures(overlay),
                turned=bool(upright(overlay).orientation),
            )
        )
    return sorted(views, key=lambda view: view.dice.get("federated", math.inf))


def _scores(rounds: Sequence[RoundLine], result: RunResult | None) -> list[ScoreLine]:
    if result is None:
        return []
    lines = []
    for site, labels in sorted(result.base_dice.items()):
        first = rounds[0].sites.get(site) if rounds else None
        for label, before in labels.items():
            cases = first.dice_cases.get(label, 0) if first else 0
            after = result.dice.get(site, {}).get(label)
            lines.append(ScoreLine(site, label, cases, before, after))
    return lines


_WORDS = {
    "refused": "refused",
    "failed": "failed at the site",
    "silent": "no answer",
    "late": "used late",
}


def _refusals(folder: RunFolder, rounds: Sequence[RoundLine]) -> list[Refusal]:
    """Return who did not take part and what was not used; equal reasons in one entry."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for site, reason in _declined(folder):
        found[site, "did not take part", reason] = []
    for event in folder.events():
        if event.get("event") == "late answer" and not event["used"]:
            reason = "its answer came after the round had closed"
            numbers = found.setdefault((str(event["site"]), "late, not used", reason), [])
            numbers.append(int(event["round"]))
    for line in rounds:
        for site, own in sorted(line.sites.items()):
            if own.status != "ok":
                found.setdefault((site, _WORDS[own.status], own.reason), []).append(line.round)
    return [
        Refusal(site, _spans(numbers) if numbers else "joining", what, reason)
        for (site, what, reason), numbers in sorted(found.items())
    ]


def _declined(folder: RunFolder) -> list[tuple[str, str]]:
    try:
        events = [event for event in folder.events() if event.get("event") == "members"]
        declined = [pair for event in events for pair in event["declined"].items()]
    except (json.JSONDecodeError, AttributeError, KeyError, UnicodeDecodeError):
        msg = f"{folder.path / 'events.jsonl'}: damaged; expected one JSON object a line"
        raise RunError(msg) from None
    return [(str(site), str(reason)) for site, reason in declined]


def _spans(numbers: Sequence[int]) -> str:
    """Return e.g. ``1, 3 to 5``."""
    spans = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        spans.append(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}")
    return ", ".join(spans)


def _traffic(rounds: Sequence[RoundLine], base: bytes | None) -> Traffic:
    own = [(line.trained, site) for line in rounds for site in line.sites.values()]
    trips = sum((site.bytes_down > 0) + (trained and site.bytes_up > 0) for trained, site in own)
    return Traffic(
        down=sum(site.bytes_down for _, site in own),
        up=sum(site.bytes_up for _, site in own),
        whole=len(base) * trips if base else None,
        base=len(base) if base else None,
        seconds=math.fsum(line.seconds for line in rounds),
    )


def _trained(plan: AdaptationPlan) -> int:
    return sum(math.prod(shape) for shape in plan.state_shapes().values())


def _parameters(base: bytes | None) -> int | None:
    try:
        return parse_model(base).parameters if base else None
    except ModelFileError:
        return None


def _number(value: float | None, pattern: str) -> str:
    """Return a number with a proper minus sign, or a dash for one that does not exist."""
    if value is None:
        return "\u2013"
    text = pattern.format(value)
    zero = not text.strip("+-0.")
    return text.lstrip("+-") if zero else text.replace("-", "\u2212")


def _megabytes(value: int) -> str:
    megabytes = value / 1e6
    return f"{megabytes:.{0 if megabytes >= 100 else 1 if megabytes >= 10 else 2}f}"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f}\u202fs"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes}\u202fmin" if hours else f"{minutes}\u202fmin {seconds}\u202fs"
