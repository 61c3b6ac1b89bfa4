"""A whole simulation: base in, rounds, release that the real Dafne opens, report; both engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.approvals import Approvals  # noqa: E402
from dafne_federated.core.dataset import open_folder  # noqa: E402
from dafne_federated.core.errors import ApprovalError  # noqa: E402
from dafne_federated.core.model_file import read_model, write_model  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.server.release import adapted_model  # noqa: E402
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.progress import Stages  # noqa: E402
from dafne_federated.simulations.simulate import (  # noqa: E402
    Simulation,
    release_difference,
    simulate,
)
from dafne_federated.simulations.test_results import load_test_rows  # noqa: E402

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
    for file in (name, Path(name).with_suffix(".json").name):
        shutil.copy(done.release / file, tmp_path / file)
    shutil.move(
        tmp_path / Path(name).with_suffix(".json").name, tmp_path / f"{name.split('_')[0]}.json"
    )
    provider = LocalModelProvider(str(tmp_path), str(tmp_path / "upload"))
    assert provider.available_models() == ["Squares"]
    assert (
        provider.load_model("Squares").timestamp_id == read_model(done.release / name).timestamp_id
    )


def test_the_release_computes_what_was_evaluated(done: RunFolder, squares_folder: Path) -> None:
    folder = open_folder(squares_folder)
    assert release_difference(done, folder.cases[0], folder.labels) < 1e-5


def test_only_the_planned_weights_differ_from_the_base(done: RunFolder) -> None:
    base, new = read_model(done.base), read_model(done.release / done.result().release)
    planned = {target.key for target in done.plan().targets}
    changed = {k for k in base.weights if not np.array_equal(base.weights[k], new.weights[k])}
    assert changed == planned
    assert base.functions == new.functions


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


def test_a_finished_run_can_be_opened_again(
    done: RunFolder, run_one: Callable[..., RunFolder]
) -> None:
    before = done.result()
    run_one("ignored", run=done.path)
    assert done.result() == before


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
    assert RunFolder(run).result().content_digest == done.result().content_digest


@pytest.mark.simulation
def test_ray_gives_the_same_result_and_leaves_nothing_running(
    done: RunFolder, run_one: Callable[..., RunFolder]
) -> None:
    pytest.importorskip("ray")
    folder = run_one("ray", engine="ray", parallel=1)
    assert folder.result().content_digest == done.result().content_digest
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    ours = [line for line in listed.stdout.splitlines() if "flower-superlink" in line]
    assert ours == []


def test_merging_the_checkpoint_gives_the_release(done: RunFolder) -> None:
    result = done.result()
    assert result.round is not None
    model = adapted_model(
        read_model(done.base), done.plan(), done.state_after(result.round), timestamp_id=7
    )
    assert model.content_digest == result.content_digest
