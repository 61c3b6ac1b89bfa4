"""What of a benchmark is kept and passed on: lines and a table, no image of a person."""

from pathlib import Path

from dafne_federated.core.files import write_atomic
from dafne_federated.simulations.benchmark_folder import BenchmarkFolder
from dafne_federated.simulations.benchmark_records import BaseLine, TestLine, read_lines
from dafne_federated.simulations.benchmark_table import Measured, markdown, table
from dafne_federated.simulations.benchmark_tuning import tried_settings, tuning_markdown


def keep_results(folder: BenchmarkFolder, found: Measured, target: Path) -> None:
    """Write ``NAME.jsonl`` and ``NAME.md`` in place of earlier ones.

    The lines are those of the bases, of the fits with the chosen settings, and of their tests.
    """
    started = folder.started()
    digests = {fit.base_digest for fit in found.fits}
    lines = [b for b in read_lines(folder.results, BaseLine) if b.digest in digests]
    cells = {fit.cell for fit in found.fits}
    tests = [test for test in read_lines(folder.final, TestLine) if test.cell in cells]
    texts = [line.model_dump_json() for line in (*lines, *found.fits, *tests)]
    write_atomic(target / f"{started.name}.jsonl", "".join(f"{t}\n" for t in texts).encode())
    who = (
        "Test persons, looked at once, after all settings were chosen on others."
        if found.tested
        else "Tuning persons, on whom settings were chosen: not a test."
    )
    versions = found.fits[0].versions if found.fits else {}
    page = [
        f"# {started.name}",
        started.scenario.question,
        f"{who} Dice: mean over persons and seeds, with a 95 % interval that resamples both. "
        "p: Wilcoxon signed-rank test over persons, Holm's correction within a size. passes: over "
        "the training slices, until the epoch or round that was kept. s: seconds of the "
        "processor on one thread until then, all sites together; longer where other work shared "
        "the machine. MB: sent until then, all sites, both ways, without the base.",
        markdown(table(folder, found), found.tested),
        f"Command: `{started.command}`",
        f"Scenario {started.scenario.digest[:16]}, images {started.data_digest[:16]}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    for line in lines:
        fold = f" of fold {line.fold}" if line.fold else ""
        page.append(
            f"Base{fold}: {line.persons} persons, {line.epochs} epochs, {line.cpu_seconds:.0f} s "
            f"of the processor, validation Dice {line.dice or 0.0:.3f}."
        )
    if tried := tuning_markdown(tried_settings(folder)):
        page += [
            "## How settings were chosen",
            "Each arm's variants with the first seed; the choice was made on tuning persons.",
            tried,
        ]
    write_atomic(target / f"{started.name}.md", "\n\n".join([*page, ""]).encode())
