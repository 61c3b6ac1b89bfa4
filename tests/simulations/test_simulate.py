"""A whole simulation: base in, rounds, release that the real Dafne opens, report; both engines."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.client.site import Site  # noqa: E402
from dafne_federated.client.site_settings import read_site  # noqa: E402
from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.dataset import open_folder  # noqa: E402
from dafne_federated.core.errors import (  # noqa: E402
    ApprovalError,
    DataError,
    RunError,
    SettingsError,
)
from dafne_federated.core.merged_model import adapted_model  # noqa: E402
from dafne_federated.core.model_file import read_model, write_model  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.core.state import state_rank  # noqa: E402
from dafne_federated.server.rounds import first_state  # noqa: E402
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.preparation import (  # noqa: E402
    Simulation,
    keep_site,
    prepare,
)
from dafne_federated.simulations.progress import Stages  # noqa: E402
from dafne_federated.simulations.release_check import load_release_check  # noqa: E402
from dafne_federated.simulations.simulate import simulate  # noqa: E402
from dafne_federated.simulations.test_results import load_test_rows  # noqa: E402
from dafne_federated.simulations.testing import release_difference  # noqa: E402

SETTINGS = RunSettings(rounds=2, epochs=3, threads=2, device="cpu", margin=0.2, max_rank=8)


@pytest.fixture(scope="module")
def run_one(
    tmp_path_factory: pytest.TempPathFactory, trained: Any, squares_folder: Path
) -> Callable[..., RunFolder]:
    def run(name: str, **changes: Any) -> RunFolder:
        os.environ["DAFNE_FEDERATED_HOME"] = str(tmp_path_factory.mktemp("home"))
        Approvals().add(read_model(trained.path), "test")
        options = {
            "run": tmp_path_factory.mktemp("runs") / name,
            "data": squares_folder,
            "base": trained.path,
            "settings": SETTINGS,
            "local_only": False,
            "partition": PartitionSettings(shares=(2, 1, 1)),
        } | changes
        with Stages(quiet=True) as stages:
            return simulate(Simulation(**options), stages)

    return run


@pytest.fixture(scope="module")
def done(run_one: Callable[..., RunFolder]) -> RunFolder:
    return run_one("inline", local_only=True)


def test_it_gains_on_persons_that_nobody_trained_on(done: RunFolder) -> None:
    result = done.result()
    assert result.released, result.reason
    rows = load_test_rows(done)
    means = {
        arm: np.mean([r.dice for r in rows if r.arm == arm])
        for arm in ("base", "local only", "federated")
    }
    assert means["federated"] > means["base"]
    partition = json.loads((done.path / "partition.json").read_text())
    tested = {case for cases in partition["test"].values() for case in cases}
    for path in (done.path / "sites").glob("*.json"):
        site = json.loads(path.read_text())
        assert not tested & {*site["training"], *site["validation"]}


def test_the_real_dafne_opens_applies_and_retrains_the_release(
    done: RunFolder, trained: Any, make_case: Callable[..., Any]
) -> None:
    from dafne_dl.model_loaders import generic_load_model

    base = read_model(trained.path)
    with (done.release / done.result().release).open("rb") as file:
        model = generic_load_model(file, install_deps=False)
    assert model.model_id == base.model_id
    assert model.timestamp_id > base.timestamp_id
    history = model.metadata["federated"]
    assert history["base_sha256"] == base.digest
    assert history["sites"] == 2
    json.dumps(model.get_metadata())
    case = make_case("new", 5, slices=5)
    data = {"image": case.image[..., 0], "resolution": np.ones(2)}
    assert set(model.apply(data)) == {"bright", "dark"}
    masks = [{n: m[..., i].astype(np.uint8) for n, m in case.masks.items()} for i in range(5)]
    images = {"image_list": [case.image[..., i] for i in range(5)], "resolution": np.ones(2)}
    before = [w.copy() for w in model.get_weights()]
    model.incremental_learn(images, masks, 5, 5)
    assert any(not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_dafnes_local_provider_finds_the_release(done: RunFolder, tmp_path: Path) -> None:
    from dafne_dl import LocalModelProvider

    name = done.result().release
    shutil.copytree(done.release, tmp_path, dirs_exist_ok=True)
    provider = LocalModelProvider(str(tmp_path), str(tmp_path / "upload"))
    assert provider.available_models() == ["Squares"]
    assert (
        provider.load_model("Squares").timestamp_id == read_model(done.release / name).timestamp_id
    )


def test_the_release_computes_what_was_evaluated(done: RunFolder, squares_folder: Path) -> None:
    folder = open_folder(squares_folder)
    difference = release_difference(done, folder.cases[0], folder.labels)
    assert difference is not None
    assert difference < 1e-5
    kept = load_release_check(done)
    assert kept is not None
    assert kept.difference < 1e-5
    words = "argest difference between the released file and the adapted network"
    assert words in done.report.read_text()


@pytest.mark.parametrize("strategy", ["alternating", "stack"])
def test_the_release_is_what_was_evaluated_at_whatever_rank(
    run_one: Callable[..., RunFolder], strategy: str
) -> None:
    settings = SETTINGS.model_copy(
        update={"strategy": strategy, "rank": 2, "epochs": 1, "gate": "none"}
    )
    folder = run_one(strategy, settings=settings)
    state = folder.state_after(2)
    assert state_rank(folder.plan(), state) == {"alternating": 2, "stack": 8}[strategy]
    kept = load_release_check(folder)
    assert kept is not None
    assert kept.difference < 1e-5
    assert load_test_rows(folder)


def test_sites_of_rank_2_and_16_train_together(
    tmp_path: Path, trained: Any, squares_folder: Path
) -> None:
    Approvals().add(read_model(trained.path), "test")
    settings = SETTINGS.model_copy(update={"max_rank": 16, "epochs": 1, "gate": "none"})
    simulation = Simulation(
        run=tmp_path / "run",
        data=squares_folder,
        base=trained.path,
        settings=settings,
        local_only=False,
        partition=PartitionSettings(shares=(2, 1, 1)),
    )
    with Stages(quiet=True) as stages:
        prepare(simulation, stages)
        for name, rank in (("clinic", 2), ("hospital", 16)):
            site = read_site(tmp_path / "run" / "sites" / f"{name}.json")
            keep_site(simulation.run, site.model_copy(update={"rank": rank}))
        folder = simulate(simulation, stages)
    lines, plan = folder.rounds(), folder.plan()
    assert [line.whole for line in lines] == [True, False, True]
    for line in lines[:2]:
        small, large = (line.sites[name].bytes_up for name in ("clinic", "hospital"))
        assert 4 < large / small < 8  # headers of messages and the whole head have no rank
    assert state_rank(plan, folder.state_after(2)) == 16
    kept = load_release_check(folder)
    assert kept is not None
    assert kept.difference < 1e-5


def test_only_the_planned_weights_differ_from_the_base(done: RunFolder) -> None:
    base, new = read_model(done.base), read_model(done.release / done.result().release)
    planned = {target.key for target in done.plan().targets}
    changed = {k for k in base.weights if not np.array_equal(base.weights[k], new.weights[k])}
    assert changed == planned
    assert base.functions == new.functions


@pytest.fixture(scope="module")
def pooled(run_one: Callable[..., RunFolder]) -> RunFolder:
    both = {"statistics": "pooled", "class_weights": "pooled"}
    return run_one("pooled", local_only=True, settings=SETTINGS.model_copy(update=both))


def test_a_run_with_pooled_statistics_gains_and_releases_what_was_evaluated(
    pooled: RunFolder, squares_folder: Path
) -> None:
    result, plan = pooled.result(), pooled.plan()
    assert result.released, result.reason
    base, new = read_model(pooled.base), read_model(pooled.release / result.release)
    changed = {k for k in base.weights if not np.array_equal(base.weights[k], new.weights[k])}
    assert changed == {target.key for target in plan.targets}
    assert all((new.weights[variance.key] > 0).all() for _, variance in plan.normalisations)
    folder = open_folder(squares_folder)
    difference = release_difference(pooled, folder.cases[0], folder.labels)
    assert difference is not None
    assert difference < 1e-5
    rows = load_test_rows(pooled)
    means = [np.mean([r.dice for r in rows if r.arm == arm]) for arm in ("base", "federated")]
    assert means[1] > means[0]


def test_the_pool_is_that_of_one_site_with_all_data(pooled: RunFolder) -> None:
    plan, kept = pooled.plan(), pooled.pooled()
    assert kept is not None
    sites = [read_site(path) for path in sorted((pooled.path / "sites").glob("*.json"))]
    names = tuple(name for site in sites for name in site.training)
    everything = Site(sites[0].model_copy(update={"name": "all", "training": names}))
    alone = everything.own_statistics(plan, first_state(pooled.info(), plan))
    federated = pooled.state_after(1)
    for key in plan.state_shapes(trained=False):
        np.testing.assert_allclose(federated[key], alone[key], rtol=1e-5, atol=1e-5)
    counts, slices = everything.class_counts(plan)
    assert kept.classes == counts
    assert sum(site.slices for site in kept.sites.values()) == slices == kept.moments[0].slices


def test_the_base_travels_once_then_adapters_only(done: RunFolder) -> None:
    base = done.base.stat().st_size
    state = sum(array.nbytes + 200 for array in done.state_after(1).values())
    first, *later = done.rounds()
    for site in first.sites.values():
        assert base < site.bytes_down < base + state + 20_000  # the plan travels once, too
    for line in later:
        for site in line.sites.values():
            assert site.bytes_down < state + 2_000
            assert site.bytes_up < state + 2_000


def test_the_report_is_there(done: RunFolder) -> None:
    text = done.report.read_text()
    assert "not a medical device" in text
    assert "clinic" in text


def test_a_second_run_of_the_same_seed_ends_in_the_same_bits(
    done: RunFolder, run_one: Callable[..., RunFolder]
) -> None:
    again = run_one("again")
    assert again.result().content_digest == done.result().content_digest
    assert again.result().release_digest != done.result().release_digest  # another time


def written(folder: RunFolder) -> dict[str, int]:
    files = (path for path in folder.path.rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files if path.name != "report.html"}


def test_a_finished_run_opened_again_does_nothing_but_the_report(
    done: RunFolder, trained: Any, squares_folder: Path
) -> None:
    before = written(done)
    assert sorted(path.name for path in (done.path / "local").iterdir()) == [
        "clinic.npz",
        "hospital.npz",
    ]
    for again in (
        Simulation(done.path),
        Simulation(done.path, data=squares_folder, base=trained.path, settings=SETTINGS),
    ):
        with Stages(quiet=True) as stages:
            simulate(again, stages)
    assert written(done) == before


@pytest.mark.parametrize("lost", [("test.json",), ("test.json", "local/hospital.npz"), ()])
def test_a_kill_between_stages_goes_on_with_the_next(
    done: RunFolder, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done.path, run)
    for name in (*lost, "release-check.json", "report.html"):
        (run / name).unlink()
    kept = (run / "local" / "clinic.npz").stat().st_mtime_ns
    with Stages(quiet=True) as stages:
        folder = simulate(Simulation(run), stages)
    assert load_test_rows(folder) == load_test_rows(done)
    assert load_release_check(folder) == load_release_check(done)
    assert (run / "local" / "clinic.npz").stat().st_mtime_ns == kept
    for name in ("clinic", "hospital"):
        file = f"local/{name}.npz"
        assert (run / file).read_bytes() == (done.path / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": RunSettings(rounds=7)}, "started with rounds 2, got 7; choose another"),
        ({"settings": RunSettings(seed=1, margin=0.5)}, "started with margin 0.2, got 0.5"),
        ({"partition": PartitionSettings(divide=2)}, "started with divide null, got 2"),
        ({"partition": PartitionSettings(shares=(3, 1, 1))}, "started with shares"),
        ({"local_only": False}, "started with local-only true, got false"),
        ({"given": frozenset({"base-epochs", "data"})}, "started with data .*, got null"),
    ],
)
def test_other_options_than_the_run_was_started_with_are_refused_by_name(
    done: RunFolder, changes: dict[str, Any], words: str
) -> None:
    with Stages(quiet=True) as stages, pytest.raises(SettingsError, match=words):
        simulate(Simulation(done.path, **changes), stages)


def test_another_base_than_the_run_was_started_with_is_refused(
    done: RunFolder, trained: Any, tmp_path: Path
) -> None:
    from dataclasses import replace

    write_model(replace(read_model(trained.path), timestamp_id=5), tmp_path / "other.model")
    other = Simulation(done.path, base=tmp_path / "other.model")
    with Stages(quiet=True) as stages, pytest.raises(SettingsError, match="started with base"):
        simulate(other, stages)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "partition.json: not found"), ("{}", "partition.json: data: Field required")],
)
def test_a_run_without_a_whole_partition_is_refused(
    done: RunFolder, tmp_path: Path, content: str | None, words: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done.path, run)
    (run / "partition.json").unlink()
    if content is not None:
        (run / "partition.json").write_text(content)
    with Stages(quiet=True) as stages, pytest.raises(RunError, match=words):
        simulate(Simulation(run), stages)


def test_a_start_that_was_cut_short_starts_again(
    done: RunFolder, run_one: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "sites").mkdir(parents=True)
    left = json.loads((done.path / "sites" / "clinic.json").read_text())
    left |= {"name": "gone", "cache": str((run / "cache" / "gone").resolve())}
    (run / "sites" / "gone.json").write_text(json.dumps(left))
    (run / "partition.json").write_text("{")
    folder = run_one("cut short", run=run)
    assert sorted(path.stem for path in (run / "sites").iterdir()) == ["clinic", "hospital"]
    assert folder.result().content_digest == done.result().content_digest


def test_settings_of_sites_that_are_not_ours_stay(
    done: RunFolder, run_one: Callable[..., RunFolder], tmp_path: Path
) -> None:
    (tmp_path / "sites").mkdir()
    shutil.copy(done.path / "sites" / "clinic.json", tmp_path / "sites" / "clinic.json")
    with pytest.raises(RunError, match="not written by a simulation here"):
        run_one("foreign", run=tmp_path)
    assert (tmp_path / "sites" / "clinic.json").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"partition": PartitionSettings(shares=(2, 0, 1))},
            SettingsError,
            "no site has validation persons.*--gate none",
        ),
        ({"partition": PartitionSettings(divide=2)}, SettingsError, "validation persons"),
        (
            {"partition": PartitionSettings(sites=1)},
            SettingsError,
            "at least min-sites 2 sites, got 1",
        ),
        ({"base": None}, SettingsError, "no base: give a .model"),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_is_written(
    run_one: Callable[..., RunFolder],
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        run_one("refused", run=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_case_without_a_label_map_is_refused_by_name(
    run_one: Callable[..., RunFolder], squares_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(squares_folder, data)
    table = data / "participants.csv"
    table.write_text(table.read_text().replace("labels/clinic-2.nii.gz", ""))
    with pytest.raises(DataError, match="case 'clinic-2': expected a label map"):
        run_one("refused", data=data, run=tmp_path / "run")
    shutil.copy(squares_folder / "participants.csv", table)
    (data / "dataset.json").write_text('{"labels": {"1": "tibia", "2": "dark matter"}}')
    with pytest.raises(DataError, match=r"labels of the model, \['bright', 'dark'\], got"):
        run_one("refused", data=data, run=tmp_path / "run")


def test_a_base_that_is_not_approved_is_not_run(
    run_one: Callable[..., RunFolder], trained: Any, tmp_path: Path
) -> None:
    from dataclasses import replace

    other = replace(read_model(trained.path), timestamp_id=5)
    write_model(other, tmp_path / "other.model")
    with pytest.raises(ApprovalError, match="nobody here has approved it"):
        run_one("refused", base=tmp_path / "other.model")


@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_simulation_goes_on_and_ends_in_the_same_bits(
    done: RunFolder, trained: Any, squares_folder: Path, tmp_path: Path, moment: int
) -> None:
    Approvals().add(read_model(trained.path), "test")
    run = tmp_path / "run"
    (tmp_path / "settings.toml").write_text(
        'rounds = 2\nepochs = 3\nthreads = 2\ndevice = "cpu"\nmargin = 0.2\nmax-rank = 8\n'
    )
    command = [
        *(sys.executable, "-m", "dafne_federated.cli.app", "simulate", str(squares_folder)),
        *("--base", str(trained.path), "--run", str(run), "--no-local-only", "--quiet"),
        *("--settings", str(tmp_path / "settings.toml")),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if len(RunFolder(run).rounds()) >= moment:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(RunFolder(run).rounds()) >= moment
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "largest difference between the released file and the adapted network" in (
        finished.stdout
    )
    assert RunFolder(run).result().content_digest == done.result().content_digest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: Ray makes sockets in it, whose paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as path:
        yield Path(path)


def descendants(process: int) -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = {process}
    while more := {own for own, parent in pairs if parent in found} - found:
        found |= more
    return found - {process}


def alive(processes: set[int]) -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return processes & {int(number) for number, state in pairs if not state.startswith("Z")}


@pytest.mark.simulation
def test_ray_gives_the_same_result_and_leaves_nothing_running(
    done: RunFolder, trained: Any, squares_folder: Path, tmp_path: Path, scratch: Path
) -> None:
    pytest.importorskip("ray")
    with ray_simulation(trained, squares_folder, tmp_path, scratch) as process:
        seen: set[int] = set()
        while process.poll() is None:
            seen |= descendants(process.pid)
            time.sleep(0.3)
        assert process.returncode == 0
    assert RunFolder(tmp_path / "run").result().content_digest == done.result().content_digest
    assert len(seen) > 5  # SuperLink, executors, Ray and its workers
    assert alive(seen) == set()


@pytest.mark.simulation
def test_after_a_kill_of_the_simulation_ray_and_flower_end(
    trained: Any, squares_folder: Path, tmp_path: Path, scratch: Path
) -> None:
    pytest.importorskip("ray")
    with ray_simulation(trained, squares_folder, tmp_path, scratch) as process:
        seen: set[int] = set()
        while process.poll() is None and not RunFolder(tmp_path / "run").rounds():
            seen |= descendants(process.pid)
            time.sleep(0.3)
        seen |= descendants(process.pid)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert len(seen) > 5
    end = time.monotonic() + 40
    while alive(seen) and time.monotonic() < end:
        time.sleep(0.5)
    assert alive(seen) == set()
    assert not list(scratch.glob("dafne-federated-ray-*"))


@contextlib.contextmanager
def ray_simulation(
    trained: Any, data: Path, folder: Path, scratch: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    Approvals().add(read_model(trained.path), "test")
    command = [
        *(sys.executable, "-m", "dafne_federated.cli.app", "simulate", str(data), "--quiet"),
        *("--base", str(trained.path), "--run", str(folder / "run"), "--no-local-only"),
        *("--engine", "ray", "--rounds", "2", "--epochs", "3", "--threads", "2"),
        *("--device", "cpu", "--margin", "0.2", "--max-rank", "8"),
    ]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_merging_the_checkpoint_gives_the_release(done: RunFolder) -> None:
    result = done.result()
    assert result.round is not None
    model = adapted_model(
        read_model(done.base), done.plan(), done.state_after(result.round), timestamp_id=7
    )
    assert model.content_digest == result.content_digest
