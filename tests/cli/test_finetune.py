"""`finetune` ends in a model that Dafne opens, or says in one line why there is none."""

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
import typer
from typer.testing import CliRunner

from dafne_federated.cli import finetune as module
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.fine_tuning_folder import FineTuningFolder
from dafne_federated.core.model_file import model_labels, read_model

app = typer.Typer()
app.command()(module.finetune)

FLAGS = ("--epochs", 6, "--schedule", "gradual", "--threads", 2, "--device", "cpu")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting TensorFlow fails the test."""
    monkeypatch.delattr(module, "prepare_backend")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--epochs", "0"), "epochs: .*, got 0"),
        (("--method", "magic"), "method: .*no method 'magic'"),
        (("--schedule", "slow"), "schedule: .*, got 'slow'"),
        (("--shares", "1,2"), "shares: expected three numbers, the first above 0, got '1,2'"),
        (("--shares", "0,1,1"), "shares: expected three numbers, the first above 0"),
        (("--shares", "a,b,c"), "shares: expected numbers with commas"),
        (("--site", "nosuch"), "site: expected one of 'clinic', 'hospital', got 'nosuch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused_first(
    tmp_path: Path, squares_folder: Path, no_work: None, flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DafneFederatedError, match=words):
        raise run("x.model", squares_folder, "-o", tmp_path / "a.model", *flags).exception
    assert list(tmp_path.iterdir()) == []


def test_the_run_needs_a_folder_of_its_own(
    tmp_path: Path, squares_folder: Path, no_work: None
) -> None:
    path = tmp_path / "a.model"
    with pytest.raises(DafneFederatedError, match="expected another path than that of the run"):
        raise run("x.model", squares_folder, "-o", path, "--run", path).exception


def test_an_output_that_is_there_is_refused_first(
    tmp_path: Path, squares_folder: Path, no_work: None
) -> None:
    (tmp_path / "a.model").touch()
    with pytest.raises(DafneFederatedError, match="a file already"):
        raise run("x.model", squares_folder, "-o", tmp_path / "a.model").exception


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
class TestRuns:
    @pytest.fixture(scope="class")
    def home(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("home")

    @pytest.fixture(autouse=True)
    def approved(self, home: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DAFNE_FEDERATED_HOME", str(home))
        Approvals().add(read_model(trained.path), "test")

    @pytest.fixture(scope="class")
    def done(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        home: Path,
        trained: Any,
        squares_folder: Path,
    ) -> Path:
        """The output of one whole run."""
        os.environ["DAFNE_FEDERATED_HOME"] = str(home)
        Approvals().add(read_model(trained.path), "test")
        output = tmp_path_factory.mktemp("out") / "new.model"
        result = run(trained.path, squares_folder, "-o", output, "--quiet", *FLAGS)
        assert result.exit_code == 0, result.exception
        assert f"model:  {output}" in result.output
        return output

    def test_the_new_model_is_approved_and_says_how_it_came_about(
        self, done: Path, trained: Any
    ) -> None:
        base, new = read_model(trained.path), read_model(done)
        assert Approvals().allows(new.digest)
        assert new.model_id == base.model_id
        assert new.timestamp_id > base.timestamp_id
        assert new.functions == base.functions
        told = new.metadata["federated"]
        assert told["base_sha256"] == base.digest
        assert told["method"] == "lora"
        assert (told["training_persons"], told["validation_persons"]) == (4, 2)
        assert told["validation_dice"]["new"] > told["validation_dice"]["base"]

    def test_the_folder_keeps_the_record_and_no_image(self, done: Path) -> None:
        folder = done.with_suffix(".run")
        assert {path.name for path in folder.iterdir()} == {
            *("run.json", "plan.json", "checkpoint.npz", "epochs.jsonl", "lock"),
            *("test.json", "result.json", "report.html"),
        }
        result = json.loads((folder / "result.json").read_text())
        assert result["written"]
        assert result["digest"] == read_model(done).digest
        assert len((folder / "epochs.jsonl").read_text().splitlines()) == 6

    def test_it_gains_on_test_persons_who_are_nobody_elses(self, done: Path) -> None:
        folder = done.with_suffix(".run")
        rows = json.loads((folder / "test.json").read_text())["rows"]
        means = {
            arm: np.mean([row["dice"] for row in rows if row["arm"] == arm])
            for arm in ("base", "fine-tuned")
        }
        assert means["fine-tuned"] > means["base"]
        cases = json.loads((folder / "run.json").read_text())["cases"]
        everybody = [name for part in cases.values() for name in part]
        assert len(everybody) == len(set(everybody)) == 8
        assert {row["case"] for row in rows} == set(cases["test"])

    def test_the_real_dafne_opens_applies_and_retrains_it(
        self, done: Path, make_case: Callable[..., Any]
    ) -> None:
        from dafne_dl.model_loaders import generic_load_model

        with done.open("rb") as file:
            model = generic_load_model(file, install_deps=False)
        case = make_case("new", 5, slices=5)
        data = {"image": case.image[..., 0], "resolution": np.ones(2)}
        found = model.apply(data)
        assert set(found) == {"bright", "dark"}
        truth = case.masks["dark"][..., 0]
        both = (found["dark"] > 0) & truth
        assert 2 * both.sum() / ((found["dark"] > 0).sum() + truth.sum()) > 0.8
        masks = [{n: m[..., i].astype(np.uint8) for n, m in case.masks.items()} for i in range(5)]
        images = {"image_list": [case.image[..., i] for i in range(5)], "resolution": np.ones(2)}
        before = [w.copy() for w in model.get_weights()]
        model.incremental_learn(images, masks, 5, 5)
        after = model.get_weights()
        assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    def test_a_finished_run_whose_model_was_lost_gives_it_again(
        self, done: Path, tmp_path: Path, trained: Any, squares_folder: Path
    ) -> None:
        output = tmp_path / "new.model"
        shutil.copytree(done.with_suffix(".run"), tmp_path / "new.run")
        result = run(trained.path, squares_folder, "-o", output, "--quiet", *FLAGS)
        assert result.exit_code == 0, result.exception
        first, second = read_model(done), read_model(output)
        assert second.content_digest == first.content_digest
        assert second.timestamp_id == first.timestamp_id
        assert second.metadata == first.metadata

    def test_other_flags_do_not_go_on_with_a_run(
        self, done: Path, tmp_path: Path, trained: Any, squares_folder: Path
    ) -> None:
        flags = (*FLAGS, "--rank", 2, "--run", done.with_suffix(".run"))
        result = run(trained.path, squares_folder, "-o", tmp_path / "b.model", "--quiet", *flags)
        with pytest.raises(DafneFederatedError, match="started with rank 4, got 2"):
            raise result.exception

    def test_after_a_kill_it_goes_on_and_ends_in_the_same_bits(
        self, done: Path, tmp_path: Path, trained: Any, squares_folder: Path
    ) -> None:
        output = tmp_path / "new.model"
        command = [
            *(sys.executable, "-m", "dafne_federated.cli.app", "finetune", str(trained.path)),
            *(str(squares_folder), "-o", str(output), "--quiet", *map(str, FLAGS)),
        ]
        lines = tmp_path / "new.run" / "epochs.jsonl"
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            end = time.monotonic() + 300
            while time.monotonic() < end and process.poll() is None and not lines.exists():
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert 1 <= len(lines.read_text().splitlines()) < 6
        assert not output.exists()
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr == ""
        assert read_model(output).content_digest == read_model(done).content_digest

    def test_nothing_is_written_that_is_not_better(
        self, tmp_path: Path, trained: Any, squares_folder: Path
    ) -> None:
        output = tmp_path / "new.model"
        flags = ("--scale", 50, "--learning-rate", 1, "--patience", 1, "--quiet", "--device", "cpu")
        result = run(trained.path, squares_folder, "-o", output, "--threads", 2, *flags)
        with pytest.raises(DafneFederatedError, match="was not written: no epoch has"):
            raise result.exception
        assert result.exit_code == 1
        assert not output.exists()
        assert "No new model was written" in (tmp_path / "new.run" / "report.html").read_text()
        told = run(
            *(trained.path, squares_folder, "-o", output, "--threads", 2, *flags),
            *("--gate", "none", "--json"),
        )
        assert told.exit_code == 0, told.exception
        assert json.loads(told.stdout)["result"]["written"]
        assert read_model(output).model_id == read_model(trained.path).model_id

    @pytest.mark.parametrize(
        ("persons", "words"),
        [(1, "1 person: all images train"), (2, "2 persons: nobody was left to test on")],
    )
    def test_with_few_persons_it_says_what_cannot_be_known(
        self, tmp_path: Path, trained: Any, squares_folder: Path, persons: int, words: str
    ) -> None:
        data, output = tmp_path / "data", tmp_path / "new.model"
        data.mkdir()
        for name in ("images", "labels", "dataset.json"):
            (data / name).symlink_to(squares_folder / name)
        table = (squares_folder / "participants.csv").read_text().splitlines()
        (data / "participants.csv").write_text("\n".join(table[: 1 + persons]) + "\n")
        flags = ("--method", "norm", "--epochs", 2, "--quiet", "--device", "cpu", "--threads", 2)
        result = run(trained.path, data, "-o", output, *flags)
        assert result.exit_code == 0, result.exception
        assert words in " ".join(result.output.split())
        assert output.exists()

    def test_new_labels_get_a_new_output_layer(
        self, tmp_path: Path, trained: Any, squares_folder: Path
    ) -> None:
        data, output = tmp_path / "data", tmp_path / "new.model"
        data.mkdir()
        for name in ("images", "labels", "participants.csv"):
            (data / name).symlink_to(squares_folder / name)
        (data / "dataset.json").write_text('{"labels": {"1": "bright", "2": "hole"}}')
        flags = ("--epochs", 20, "--site", "clinic", "--quiet", "--device", "cpu", "--threads", 2)
        result = run(trained.path, data, "-o", output, *flags)
        assert result.exit_code == 0, result.exception
        assert "the data has 'hole', which the model does not know" in result.stderr
        base, new = read_model(trained.path), read_model(output)
        assert model_labels(new) == {1: "bright", 2: "hole"}
        assert new.model_id != base.model_id
        assert new.metadata["federated"]["new_labels_from_sha256"] == base.digest
        assert FineTuningFolder(tmp_path / "new.run").info().persons["training"] == 2
        again = run(trained.path, data, "-o", tmp_path / "b.model", *flags, "--labels", "base",
                    "--run", tmp_path / "new.run")  # fmt: skip
        with pytest.raises(DafneFederatedError, match="the run was started with"):
            raise again.exception
