"""A whole simulation: base in, rounds, release that the real Dafne opens, report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

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
from dafne_federated.simulations.partition import PartitionSettings  # noqa: E402
from dafne_federated.simulations.preparation import Simulation  # noqa: E402
from dafne_federated.simulations.progress import Stages  # noqa: E402
from dafne_federated.simulations.release_check import load_release_check  # noqa: E402
from dafne_federated.simulations.simulate import simulate  # noqa: E402
from dafne_federated.simulations.test_results import load_test_rows  # noqa: E402
from dafne_federated.simulations.testing import release_difference  # noqa: E402
from tests.simulations.conftest import SETTINGS  # noqa: E402


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
            "only validation persons can show.*expected min-persons 1 .*got 0.*--gate none",
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


def test_merging_the_checkpoint_gives_the_release(done: RunFolder) -> None:
    result = done.result()
    assert result.round is not None
    model = adapted_model(
        read_model(done.base), done.plan(), done.state_after(result.round), timestamp_id=7
    )
    assert model.content_digest == result.content_digest
