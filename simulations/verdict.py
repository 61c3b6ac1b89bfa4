"""What a run has shown, in sentences that say no more than its numbers."""

from collections.abc import Sequence

from dafne_federated.core.metrics import mean
from dafne_federated.core.run_folder import RoundLine, RunInfo, RunResult
from dafne_federated.simulations.comparison import Comparison, Line

_SAME = 0.005  # Dice that differ by less are the same on paper


def verdict(
    info: RunInfo,
    rounds: Sequence[RoundLine],
    result: RunResult | None,
    comparison: Comparison | None,
) -> list[str]:
    """Return the sentences at the top of a report, the most important one first.

    Args:
        info: What the run was started with.
        rounds: Its rounds so far.
        result: How it ended; None while it is going on.
        comparison: What was measured on test persons, if anything.
    """
    sentences = [_progress(info, rounds)] if result is None else []
    if comparison is not None and comparison.total.gain("federated") is not None:
        sentences += _on_test_persons(comparison, info.settings.margin)
    elif result is not None:
        sentences.append(_on_validation_persons(result))
    if result is not None:
        sentences.append(_release(result))
        sentences += _warning(result, comparison)
    return sentences


def counted(number: int, word: str) -> str:
    """Return e.g. ``1 person`` or ``4 persons``."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _progress(info: RunInfo, rounds: Sequence[RoundLine]) -> str:
    done = sum(line.trained for line in rounds)
    return (
        f"This run has not ended: {done} of {counted(info.settings.rounds, 'round')} of training "
        "are on record, and nothing was released so far."
    )


def _on_test_persons(comparison: Comparison, margin: float) -> list[str]:
    total = comparison.total
    before, after = total.dice("base") or 0.0, total.dice("federated") or 0.0
    who = f"{counted(total.persons, 'person')} of {counted(len(comparison.site_lines), 'site')}"
    first = f"Federated adaptation {moved(before, after)} on persons that nobody trained on"
    both = [p for p in comparison.persons.values() if "base" in p and "federated" in p]
    higher = sum(means["federated"] > means["base"] for means in both)
    first += f" ({who}; higher in {higher} of {len(both)} persons)"
    alone = total.dice("local only")
    if alone is not None:
        first += f"; training each site alone reached {alone:.2f}"
        if abs(after - alone) < _SAME:
            first += ", practically the same"
        elif alone > after:
            first += ", which is more"
    sentences = [first + "."]
    sites = [line for line in comparison.site_lines.values() if _lost(line) >= _SAME]
    if sites and len(comparison.site_lines) > 1:
        count = counted(len(comparison.site_lines), "site")
        where = ", ".join(f"{line.site} ({_change(line)})" for line in sites)
        sentences.append(f"It fell at {len(sites)} of {count}: {where}.")
    lines = [line for lines in comparison.lines.values() for line in lines]
    fallen = sorted((line for line in lines if _lost(line) > margin), key=_lost, reverse=True)
    if fallen and len(lines) > 1:
        where = ", ".join(f"{line.label} of {line.site} ({_change(line)})" for line in fallen[:3])
        more = f" and {len(fallen) - 3} more" if len(fallen) > 3 else ""
        sentences.append(f"Single labels fell by more than {margin:g}: {where}{more}.")
    return sentences


def _lost(line: Line) -> float:
    return -(line.gain("federated") or 0.0)


def _change(line: Line) -> str:
    return _shown(line.dice("base") or 0.0, line.dice("federated") or 0.0)


def _on_validation_persons(result: RunResult) -> str:
    before = mean([mean(list(labels.values())) for labels in result.base_dice.values()])
    after = mean([mean(list(labels.values())) for labels in result.dice.values()])
    if before is None or after is None:
        return "No Dice was measured, so nothing is known about the quality of this run."
    who = counted(len(result.base_dice), "site")
    if result.decision is not None and result.decision.accepted:
        people = result.decision.persons
        return (
            f"Federated adaptation {moved(before, after)} on the validation persons of {who}; "
            f"the {people} who accepted it had no part in choosing the round."
        )
    return (
        f"Federated adaptation {moved(before, after)} on the validation persons of {who}; those "
        "persons also decided which round to release, so expect less on new ones."
    )


def moved(before: float, after: float) -> str:
    """Return what became of mean Dice, e.g. ``raised mean Dice from 0.61 to 0.72``."""
    if abs(after - before) < _SAME:
        return f"left mean Dice practically unchanged ({_shown(before, after)})"
    return f"{'raised' if after > before else 'lowered'} mean Dice from {_shown(before, after)}"


def _shown(before: float, after: float) -> str:
    """Return two Dice with as many digits as it takes to tell them apart, three at most."""
    digits = 2 if f"{before:.2f}" != f"{after:.2f}" else 3
    return f"{before:.{digits}f} to {after:.{digits}f}"


def _release(result: RunResult) -> str:
    if result.released:
        return (
            f"Released as {result.release}, the state after round {result.round}: {result.reason}."
        )
    return f"Nothing was released: {result.reason}."


def _warning(result: RunResult, comparison: Comparison | None) -> list[str]:
    gain = comparison.total.gain("federated") if comparison else None
    if result.released and gain is not None and gain <= -_SAME:
        return [
            "The release passed on the sites' validation persons but is worse than its base on "
            "the test persons: do not use it before the reason is known."
        ]
    return []
