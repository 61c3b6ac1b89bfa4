"""The report of a fine-tuning: one HTML file that a clinician can read, with nothing to load."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dafne_federated.core.files import write_atomic
from dafne_federated.core.fine_tuning_folder import (
    FineTuningFolder,
    FineTuningInfo,
    FineTuningResult,
    Progress,
)
from dafne_federated.core.methods import method_words
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.simulations.comparison import Comparison, compare, persons_to_show
from dafne_federated.simulations.figures import Picture
from dafne_federated.simulations.fine_tuning_figures import dice_by_epoch, loss_by_epoch
from dafne_federated.simulations.overlay_pictures import label_swatch, overlay_pictures, upright
from dafne_federated.simulations.report import report_environment
from dafne_federated.simulations.test_results import FINE_TUNED, Overlay, TestRow
from dafne_federated.simulations.verdict import counted, moved

# The adapted base among the arms that ``TestRow`` knows.
NEW = FINE_TUNED


@dataclass(frozen=True)
class OverlayView:
    """One overlay with its words.

    Attributes:
        overlay: The slice.
        rank: ``lowest``, ``median``, ``highest`` or ``only``.
        dice: Mean Dice of the person by ``truth``, ``base`` and ``new``; the first has none.
        pictures: By the same names.
        turned: Whether directions are known, so that it stands upright.
    """

    overlay: Overlay
    rank: str
    dice: dict[str, float]
    pictures: dict[str, Picture]
    turned: bool


def write_fine_tuning_report(
    folder: FineTuningFolder,
    info: FineTuningInfo,
    plan: AdaptationPlan,
    progress: Progress,
    result: FineTuningResult,
    rows: Sequence[TestRow],
    overlays: Sequence[Overlay],
) -> Path:
    """Write the page and return its path; the same arguments give the same bytes.

    Args:
        folder: Where it goes.
        info: What was started.
        plan: What was trained.
        progress: All epochs.
        result: How it ended.
        rows: Base and new model on test persons; arm ``NEW`` is the new model.
        overlays: A slice of each test case.
    """
    comparison = compare(rows, plan.labels) if rows else None
    taken = result.epoch or None
    page = {
        "info": info,
        "plan": plan,
        "lines": progress.lines,
        "slices": progress.slices,
        "result": result,
        "comparison": comparison,
        "new": NEW,
        "verdict": verdict(info, result, comparison),
        "trains": method_words(plan.method),
        "loss": loss_by_epoch(progress.lines),
        "dice": dice_by_epoch(progress.lines, result.base_dice, taken),
        "overlays": _views(overlays, comparison, rows),
        "label_legend": {label: label_swatch(n) for n, label in enumerate(plan.labels, start=1)},
        "settings": info.settings.model_dump(mode="json", by_alias=True),
    }
    html = report_environment().get_template("fine_tuning_report.html.jinja").render(page)
    write_atomic(folder.report, html.encode())
    return folder.report


def verdict(
    info: FineTuningInfo, result: FineTuningResult, comparison: Comparison | None
) -> list[str]:
    """Return the sentences at the top, the most important one first."""
    sentences = []
    if comparison and comparison.total.gain(NEW) is not None:
        before, after = comparison.total.dice("base") or 0.0, comparison.total.dice(NEW) or 0.0
        scores = [means for means in comparison.persons.values() if {"base", NEW} <= means.keys()]
        higher = sum(means[NEW] > means["base"] for means in scores)
        sentences.append(
            f"Fine-tuning {moved(before, after)} on {counted(comparison.total.persons, 'person')} "
            f"that nobody trained on (higher in {higher} of {len(scores)})."
        )
        if result.written and after <= before - 0.005:
            sentences.append(
                "It is better on the validation persons but worse on the test persons: do not "
                "use the new model before the reason is known."
            )
    elif not result.written:
        sentences.append("Fine-tuning found nothing that is better than the base.")
    elif result.base_dice is not None and result.dice is not None:
        sentences.append(
            f"Fine-tuning {moved(result.base_dice, result.dice)} on the validation slices; they "
            "also decided which epoch to take, so expect less on new persons."
        )
    else:
        sentences.append("Nothing is known about the quality of the new model: nobody tested it.")
    word = "A new model was written" if result.written else "No new model was written"
    sentences.append(f"{word}: {result.reason}.")
    if note := persons_note(info.persons):
        sentences.append(note)
    if info.given_digest != info.base_digest:
        sentences.append(
            "The labels are new, so the output layer was, too: the base's Dice is that of the "
            "new layer before training, and a rise above it is no more than a start."
        )
    return sentences


def persons_note(persons: dict[str, int]) -> str:
    """Return what cannot be known for want of persons, in words; empty if all can."""
    missing = {name for name, count in persons.items() if not count}
    who = counted(sum(persons.values()), "person")
    if {"validation", "test"} <= missing:
        return (
            f"{who}: all images train, so nobody was left to choose an epoch or to test on, and "
            "the last epoch is taken."
        )
    if "test" in missing:
        return f"{who}: nobody was left to test on."
    if "validation" in missing:
        return f"{who}: nobody was left to choose an epoch, and the last one is taken."
    return ""


def _views(
    overlays: Sequence[Overlay], comparison: Comparison | None, rows: Sequence[TestRow]
) -> list[OverlayView]:
    """Return overlays of the persons with the lowest, the median and the highest Dice."""
    ranks = persons_to_show(rows, NEW) if rows else {}
    scores = comparison.persons if comparison else {}
    views: dict[tuple[str, str], OverlayView] = {}
    for overlay in overlays:
        person = overlay.site, overlay.person
        if person not in ranks or person in views:
            continue
        pictures = overlay_pictures(overlay)
        dice = scores.get(person, {})
        views[person] = OverlayView(
            overlay=overlay,
            rank=ranks[person],
            dice={_shown(arm): value for arm, value in dice.items()},
            pictures={_shown(arm): picture for arm, picture in pictures.items()},
            turned=bool(upright(overlay).orientation),
        )
    return sorted(views.values(), key=lambda view: view.dice.get("new", 0.0))


def _shown(arm: str) -> str:
    return "new" if arm == NEW else arm
