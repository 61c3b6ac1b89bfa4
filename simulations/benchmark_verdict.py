"""What a benchmark found, in words, the most important sentence first."""

from collections.abc import Sequence

from dafne_federated.simulations.benchmark_scenario import Scenario
from dafne_federated.simulations.benchmark_statistics import Difference
from dafne_federated.simulations.benchmark_table import REFERENCE, Row, p_words

_POINT = 0.005  # a smaller difference of Dice is none


def benchmark_verdict(scenario: Scenario, rows: Sequence[Row], tested: bool) -> list[str]:
    """Return the sentences at the top of the report.

    Args:
        scenario: What was asked.
        rows: The table.
        tested: Whether the figures are those of test persons.
    """
    federated = [arm for arm, own in scenario.arms.items() if own.where == "federated"]
    sentences = []
    for persons in scenario.sites.persons:
        here = [row for row in rows if row.persons == persons]
        own = [row for row in here if row.arm in federated]
        for row, gain, where in (
            *((row, row.gain, "persons of the sites") for row in own),
            *((row, row.held_out_gain, "a centre that took no part") for row in own),
        ):
            if gain is not None:
                sentences.append(_sentence(row, gain, where, scenario.descriptive))
    if not sentences:
        sentences.append(f"Nothing was compared with {REFERENCE} yet.")
    if not tested:
        sentences.append(
            "These are development persons, on whom settings were chosen: expect less on others. "
            "The test was not made."
        )
    if scenario.descriptive:
        sentences.append("There are too few persons for tests; all figures are descriptions.")
    return sentences


def _sentence(row: Row, gain: Difference, where: str, descriptive: bool) -> str:
    value = gain.gain.mean
    size = f"{abs(value):.3f}"
    word = "as good as" if abs(value) < _POINT else "better than" if value > 0 else "worse than"
    by = "" if abs(value) < _POINT else f" by {size} Dice"
    low, high = gain.gain.low, gain.gain.high
    sure = "" if low is None or high is None else f" (95 % interval {low:+.3f} to {high:+.3f}"
    if sure and gain.adjusted is not None:
        sure += f", p {p_words(gain.adjusted)} after Holm's correction"
    sure += ")" if sure else ""
    size_words = f"{row.persons} persons per site" if row.persons else "all persons"
    if row.persons == 1:
        size_words = "one person per site"
    note = "" if descriptive or sure else " (too few persons for an interval)"
    return (
        f"With {size_words}, {row.arm} is {word} {REFERENCE}{by} on {where}{sure}{note}; "
        f"higher in {gain.better} of {gain.persons}."
    )
