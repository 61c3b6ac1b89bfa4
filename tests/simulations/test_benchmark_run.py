"""A benchmark fits every arm once, goes on after a kill, and touches its test at the end."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.errors import RunError  # noqa: E402
from dafne_federated.simulations.benchmark_cells import groups  # noqa: E402
from dafne_federated.simulations.benchmark_child import main  # noqa: E402
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder  # noqa: E402
from dafne_federated.simulations.benchmark_records import (  # noqa: E402
    FitLine,
    TestLine,
    read_lines,
)
from dafne_federated.simulations.benchmark_report import write_benchmark_report  # noqa: E402
from dafne_federated.simulations.benchmark_results import keep_results  # noqa: E402
from dafne_federated.simulations.benchmark_run import (  # noqa: E402
    Benchmark,
    chosen_fits,
    run_benchmark,
)
from dafne_federated.simulations.benchmark_scenario import Scenario, scenario_of  # noqa: E402
from dafne_federated.simulations.benchmark_table import measured, table  # noqa: E402

HEAD = """
version = 1
question = "Does it run?"
data = "phantoms"
every-nth-slice = 3
seeds = [1, 2]
[persons]
tuning = 1
test = 2
phantoms = { base = 3, north = 4, east = 4, west = 1 }
folds = [{ held-out = "west", base-site = "base" }]
[sites]
persons = [1]
[network]
size = 16
resolution = 12.0
filters = [4, 8]
strides = [2]
base-epochs = 2
"""
ARMS = """
[arms.base]
where = "base"
trains = "nothing"
[arms.central-scratch]
where = "central"
trains = "scratch"
with-base = true
settings = { epochs = 2 }
variants = [{ learning-rate = 1e-3 }, { learning-rate = 1e-2 }]
[arms.local-full]
where = "local"
trains = "whole"
settings = { epochs = 2 }
[arms.local-lora]
where = "local"
trains = "adapter"
settings = { epochs = 2 }
[arms.ensemble]
where = "ensemble"
trains = "nothing"
of = "local-full"
[arms.dafne-merge]
where = "dafne-merge"
trains = "whole"
settings = { epochs = 1, contributions = 3, accept = "not-worse" }
[arms.federated-product]
where = "federated"
trains = "adapter"
settings = { strategy = "product", rounds = 2, epochs = 1 }
"""


@pytest.fixture(scope="module")
def content() -> Scenario:
    return scenario_of(HEAD + ARMS, "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, content: Scenario) -> Benchmark:
    """A benchmark whose groups were all fitted, in this process."""
    folder = BenchmarkFolder(tmp_path_factory.mktemp("benchmark") / "run")
    benchmark = Benchmark(folder, "tiny", content)
    run_benchmark(replace(benchmark, only=("base",)))
    for group in groups(content):
        main(folder.path, "fits", group.arm, str(group.persons), str(group.fold))
    return benchmark


def test_every_arm_is_fitted_with_every_seed_once(run: Benchmark) -> None:
    lines = read_lines(run.folder.results, FitLine)
    cells = [line.cell for line in lines]
    assert len(cells) == len(set(cells)) == 1 + 3 + 5 * 2
    before = run.folder.results.read_bytes()
    assert run_benchmark(run) == []
    assert run.folder.results.read_bytes() == before


def test_each_arm_says_what_it_took(run: Benchmark) -> None:
    by_arm = {line.arm: line for line in read_lines(run.folder.results, FitLine)}
    federated, merged = by_arm["federated-product"], by_arm["dafne-merge"]
    assert [point.epoch for point in federated.curve] == [1, 2]
    assert len(merged.curve) == 3
    assert 0 < federated.curve[0].megabytes < federated.curve[1].megabytes
    assert federated.parameters < merged.parameters
    size = sum(value.nbytes for value in _weights(run, merged.cell)) / 1e6
    assert merged.curve[-1].megabytes == pytest.approx(3 * 2 * size)
    assert by_arm["local-full"].curve[-1].megabytes == 0
    # At most: two sites side by side take no longer than one after the other.
    for line in by_arm.values():
        assert all(point.longest <= point.seconds for point in line.curve)
    # With the persons of the base there are more slices.
    assert by_arm["central-scratch"].slices > by_arm["local-full"].slices


def test_the_same_fit_again_ends_in_the_same_bits(run: Benchmark, tmp_path: Path) -> None:
    benchmark = replace(run, folder=BenchmarkFolder(tmp_path / "again"), only=("base",))
    run_benchmark(benchmark)
    for arm in ("central-scratch", "federated-product"):
        main(benchmark.folder.path, "fits", arm, "1", "0")
    again = {line.cell: line for line in read_lines(benchmark.folder.results, FitLine)}
    first = {line.cell: line for line in read_lines(run.folder.results, FitLine)}
    assert again.keys() < first.keys()
    for cell, line in again.items():
        assert line.scores == first[cell].scores
        assert [point.dice for point in line.curve] == [point.dice for point in first[cell].curve]


def test_a_killed_benchmark_goes_on_where_it_was(content: Scenario, tmp_path: Path) -> None:
    scenario = tmp_path / "tiny.toml"
    scenario.write_text(HEAD + ARMS)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dafne_federated.cli.app", "benchmark", str(scenario)]
    command += ["--run", str(run), "--only", "central-scratch", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    results = BenchmarkFolder(run).results
    while time.monotonic() < end and process.poll() is None:
        if read_lines(results, FitLine):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait()
    before = read_lines(results, FitLine)
    assert before
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "about 0 min left" in done.stderr
    after = read_lines(results, FitLine)
    assert after[: len(before)] == before
    assert len({line.cell for line in after}) == len(after) == 3


def test_the_test_is_made_once_and_nothing_is_chosen_after_it(
    run: Benchmark, tmp_path: Path
) -> None:
    before = measured(run.folder)
    assert not before.tested
    assert run_benchmark(replace(run, only=("base", "federated-product")), final=False) == []
    run_benchmark(run)  # the scenario as a whole was started last
    assert run_benchmark(run, final=True) == []
    tests = read_lines(run.folder.final, TestLine)
    started = run.folder.started()
    assert [line.cell for line in chosen_fits(run.folder, started)] != []
    assert {line.cell for line in tests} == {f.cell for f in chosen_fits(run.folder, started)}
    sites = {(score.site, score.held_out) for line in tests for score in line.scores}
    assert ("west", True) in sites
    assert all(held_out is (site == "west") for site, held_out in sites)
    assert run_benchmark(run, final=True) == []
    assert read_lines(run.folder.final, TestLine) == tests
    found = measured(run.folder)
    assert found.tested
    assert {row.arm for row in table(run.folder, found)} == set(run.scenario.arms)
    page = write_benchmark_report(run.folder).read_text(encoding="utf-8")
    assert "Worst cases" in page
    keep_results(run.folder, found, tmp_path)
    kept = (tmp_path / "tiny.md").read_text(encoding="utf-8")
    assert "Test persons, looked at once" in kept
    assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 1 + 2 * len(found.fits)
    arm = ARMS[ARMS.index("[arms.fed") :].replace("-product", "-x")
    # Fits go by what acts on them: under another name alone they would be the same ones.
    more = scenario_of(HEAD + ARMS + arm.replace("rounds = 2", "rounds = 3"), "")
    with pytest.raises(RunError, match="the test was made already, and arm 'federated-x'"):
        run_benchmark(replace(run, scenario=more))


def _weights(run: Benchmark, cell: str) -> list[object]:
    import numpy as np

    with np.load(run.folder.fit(cell), allow_pickle=False) as arrays:
        return [arrays[name] for name in arrays.files]
