"""The page of a benchmark needs no network, names what was found, and fits on a phone."""

import re
from pathlib import Path

import pytest

from dafne_federated.simulations.benchmark_cells import cell_key, first_cells, groups, other_cells
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder, Started
from dafne_federated.simulations.benchmark_records import (
    FitLine,
    Point,
    Score,
    TestLine,
    append_line,
)
from dafne_federated.simulations.benchmark_report import write_benchmark_report
from dafne_federated.simulations.benchmark_results import keep_results
from dafne_federated.simulations.benchmark_scenario import scenario_of
from dafne_federated.simulations.benchmark_table import measured, table
from dafne_federated.simulations.phantoms import write_phantoms
from tests.browser import complaints, needs_browser, on_a_phone

SCENARIO = """
version = 1
question = "Is <b> better?"
data = "phantoms"
seeds = [1, 2]
[persons]
base = 1
test = 8
phantoms = { base = 12 }
[sites]
number = 2
persons = [1, 2]
[arms.central-scratch]
where = "central"
trains = "scratch"
[arms.federated-product]
where = "federated"
trains = "adapter"
variants = [{ learning-rate = 1e-3 }, { learning-rate = 3e-3 }]
"""
GAIN = 0.05  # of the federated arm, on every person


@pytest.fixture
def folder(tmp_path: Path) -> BenchmarkFolder:
    """A benchmark that ended, with figures that are known."""
    found = BenchmarkFolder(tmp_path / "run")
    scenario = scenario_of(SCENARIO, "test")
    started = Started(
        name="known", scenario=scenario, data=None, data_digest="0" * 64, command="a & b"
    )
    found.begin(started)
    write_phantoms(found.images(started) / "images", {"base": 8}, 1)
    for group in groups(scenario):
        federated = group.arm == "federated-product"
        for cell in (*first_cells(scenario, group), *other_cells(scenario, group, int(federated))):
            base = 0.5 + 0.1 * group.persons + GAIN * federated
            scores = tuple(
                Score(person=p, site="base", case=p, label="vastus", dice=base + 0.01 * n)
                for n, p in enumerate(f"base-{number:03d}" for number in range(8))
            )
            shared = {
                "cell": cell_key(scenario, cell, started.data_digest),
                "scenario": "known",
                "arm": group.arm,
                "seed": cell.seed,
                "persons": group.persons,
                "fold": "",
            }
            curve = tuple(
                Point(
                    epoch=n,
                    seconds=2.0 * n,
                    longest=1.0 * n,
                    megabytes=0.5 * n * federated,
                    dice=0.3 + 0.1 * n + 0.01 * cell.variant,
                )
                for n in (1, 2, 3)
            )
            fit = FitLine(
                **shared,
                scenario_digest=scenario.digest,
                variant=scenario.arms[group.arm].variants[cell.variant],
                curve=curve,
                kept=2,
                parameters=7,
                slices=9,
                seconds=3.0,
                cpu_seconds=2.0,
                peak_mib=1.0,
                versions={"dafne-federated": "1"},
                base_digest="d",
                scores=(),
            )
            append_line(found.results, fit)
            append_line(found.final, TestLine(**shared, scores=scores))
    return found


def test_the_variant_with_the_best_validation_dice_is_the_one_that_counts(
    folder: BenchmarkFolder,
) -> None:
    found = measured(folder)
    assert found.tested
    rows = {(row.arm, row.persons): row for row in table(folder, found)}
    assert len(rows) == 4
    own = rows["federated-product", 2]
    assert own.variant == {"learning-rate": 3e-3}
    assert own.seeds == 2
    assert own.gain is not None
    assert own.gain.gain.mean == pytest.approx(GAIN)
    assert (own.gain.better, own.gain.p) == (8, pytest.approx(2 / 2**8))
    assert own.megabytes == pytest.approx(1.5)
    assert rows["central-scratch", 1].megabytes is None


def test_the_page_loads_nothing_and_says_what_was_found(folder: BenchmarkFolder) -> None:
    page = write_benchmark_report(folder).read_text(encoding="utf-8")
    assert page == write_benchmark_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page)
    assert "Is &lt;b&gt; better?" in page
    assert "federated-product is better than central-scratch by 0.050 Dice" in page
    assert "higher in 8 of 8" in page
    assert "<code>a &amp; b</code>" in page


def test_what_is_kept_holds_no_image(folder: BenchmarkFolder, tmp_path: Path) -> None:
    keep_results(folder, measured(folder), tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "known.jsonl",
        "known.md",
    ]
    text = (tmp_path / "kept" / "known.md").read_text(encoding="utf-8")
    assert "+0.050" in text
    # All that was tried stands there, not the choice alone.
    tried = text.partition("How settings were chosen")[2]
    assert "| 1 | federated-product | learning-rate 0.001 |" in tried
    assert "| 2 | federated-product | learning-rate 0.003 |" in tried
    assert "central-scratch" not in tried
    assert str(tmp_path) not in text


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_it_on_a_phone_without_complaint(
    folder: BenchmarkFolder, tmp_path: Path
) -> None:
    html = write_benchmark_report(folder).read_text(encoding="utf-8")
    assert complaints(folder.report, tmp_path) == ""
    seen = on_a_phone(html, tmp_path)
    assert seen.inner == 360
    assert seen.content <= seen.inner
    assert seen.broken == 0
    assert seen.images > 10
