"""`models` lists, shows, pulls and pushes; a push needs a release, a yes, and the newest base."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import KEY, START, StandIn, digest
from typer.testing import CliRunner

from dafne_federated.cli.app import app
from dafne_federated.core.errors import DafneFederatedError
from dafne_federated.core.files import arrays_digest, sha256
from dafne_federated.core.model_file import read_model
from dafne_federated.core.paired_changes import PairedChange
from dafne_federated.core.plan import AdaptationPlan, Target
from dafne_federated.core.run_folder import RoundLine, RunFolder, RunInfo, SiteRound
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State
from dafne_federated.server.deployment_folder import signing_key
from dafne_federated.server.release import release
from dafne_federated.simulations.release_check import ReleaseCheck, save_release_check

STATE: State = {"0000/delta": np.float32([1, 2])}
OTHER = b"what somebody else published"


def model_bytes(name: str = "Limb") -> bytes:
    content = {
        "model_id": "family", "weights": [np.ones(2, np.float32)], "timestamp_id": 1,
        "metadata": {"model_name": name},
        "init_model_function": "def f():\n    pass\n",
        "apply_model_function": "def f():\n    LABELS_DICT = {1: 'muscle'}\n",
        "incremental_learn_function": "def f():\n    pass\n",
    }  # fmt: skip
    return pickle.dumps(content, protocol=4)


BASE = model_bytes()


@pytest.fixture
def server(start_server: Callable[..., Any]) -> tuple[StandIn, str]:
    stand_in, address = start_server()
    stand_in.models = {"Limb": {str(START): BASE}}
    stand_in.about = {"Limb": {"model_name": "Limb", "info": {"Author": "x\n\x1b[8m"}}}
    stand_in.may_merge = {"Limb"}
    return stand_in, address


@pytest.fixture
def stand_in(server: tuple[StandIn, str]) -> StandIn:
    return server[0]


@pytest.fixture
def models(server: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("DAFNE_API_KEY", KEY)

    def run(command: str, *arguments: object) -> Any:
        texts = [str(a) for a in arguments]
        return CliRunner().invoke(app, ["models", command, *texts, "--server", server[1]])

    return run


def finished_run(
    path: Path, base: bytes = BASE, gain: float = 0.1, created: int = START + 1, **settings: Any
) -> RunFolder:
    """The folder of a run that measured this gain, with its release if the gate lets it pass."""
    plan = AdaptationPlan(
        base_digest=sha256(base),
        method="head",
        rank=1,
        max_rank=1,
        scale=1.0,
        labels=("muscle",),
        targets=(Target(key="0000", layer="head", kind="delta", shape=(2,)),),
    )
    info = RunInfo(
        run="0" * 32,
        created=created,
        base_digest=plan.base_digest,
        base_name="Limb",
        plan_digest=plan.digest,
        settings=RunSettings(**settings),
        versions={},
        command="",
    )
    folder = RunFolder.create(path, info, plan, base)
    for number, dice in ((1, 0.5), (2, 0.5 + gain)):
        change = {"muscle": PairedChange(persons=3, total=3 * (dice - 0.5), squares=0.1)}
        site = SiteRound(
            status="ok", training_cases=3, dice={"muscle": dice}, dice_cases={"muscle": 3},
            accept=change,
        )  # fmt: skip
        line = RoundLine(
            round=number, trained=number == 1, sites={"a": site}, aggregation_error=None,
            state_digest=arrays_digest(STATE), seconds=1.0,
        )  # fmt: skip
        folder.finish_round(line, STATE)
    release(folder, signing_key(folder))
    return folder


@pytest.fixture
def released(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "run")
    return folder.release / folder.result().release


def test_models_are_listed(models: Callable[..., Any]) -> None:
    shown = models("list")
    assert shown.exit_code == 0, shown.exception
    assert "Limb" in shown.output
    assert digest(BASE)[:16] in shown.output
    (facts,) = json.loads(models("list", "--json").output)
    assert (facts["name"], facts["latest"], facts["size"]) == ("Limb", START, len(BASE))
    assert facts["versions"] == [{"version": START, "digest": digest(BASE)}]


def test_one_model_is_shown_on_lines_of_its_own(models: Callable[..., Any]) -> None:
    shown = models("show", "Limb")
    assert digest(BASE)[:16] in shown.output
    assert "\x1b[8m" not in shown.output
    facts = json.loads(models("show", "Limb", "--json").output)
    assert facts["metadata"]["info"] == {"Author": "x\n\x1b[8m"}


def test_a_version_is_pulled_and_a_file_is_never_replaced(
    stand_in: StandIn, models: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = models("pull", "Limb")
    assert done.exit_code == 0, done.exception
    assert (tmp_path / f"Limb_{START}.model").read_bytes() == BASE
    assert digest(BASE) in done.output
    with pytest.raises(DafneFederatedError, match="there is a file already"):
        raise models("pull", "Limb").exception
    facts = json.loads(models("pull", "Limb", "-o", "new.model", "--json").output)
    assert facts == {"file": "new.model", "version": START, "digest": digest(BASE)}
    assert len(stand_in.routes("get_model")) == 1  # the second came from the cache


def test_what_is_no_model_is_not_written(
    stand_in: StandIn, models: Callable[..., Any], tmp_path: Path
) -> None:
    stand_in.models["Limb"][str(START + 1)] = b"servers take any file"
    with pytest.raises(DafneFederatedError, match=f"version {START + 1} on the server is no model"):
        raise models("pull", "Limb", "-o", tmp_path / "x.model").exception
    assert not (tmp_path / "x.model").exists()


def test_list_pull_adapt_push_verify(
    stand_in: StandIn, models: Callable[..., Any], tmp_path: Path
) -> None:
    assert models("pull", "Limb", "-o", tmp_path / "base.model").exit_code == 0
    folder = finished_run(tmp_path / "run", (tmp_path / "base.model").read_bytes())
    file = folder.release / folder.result().release
    done = models("push", file, "--yes", "--json")
    assert done.exit_code == 0, done.exception
    facts = json.loads(done.output)
    assert facts["digest"] == digest(file.read_bytes()) == digest(stand_in.newest("Limb"))
    assert facts["beside"] == []
    listed = json.loads(models("list", "--json").output)[0]
    assert listed["latest"] == facts["version"] > START
    again = tmp_path / "again.model"
    assert models("pull", "Limb", "-o", again).exit_code == 0
    np.testing.assert_array_equal(
        read_model(again).weights["0000"], read_model(folder.base).weights["0000"] + [1, 2]
    )
    assert read_model(again).model_id == read_model(folder.base).model_id


def test_a_moved_version_ends_in_status_3_and_says_what_to_do(
    stand_in: StandIn, models: Callable[..., Any], released: Path
) -> None:
    stand_in.models["Limb"][str(START + 5)] = OTHER
    for extra in ((), ("--force",), ("--contribute",)):
        done = models("push", released, "--yes", *extra)
        assert done.exit_code == 3
        first, *commands = done.stderr.splitlines()
        assert first.endswith("Pull it, run again from it, pass the gate again, then push")
        assert f"models pull Limb --version {START + 5} -o Limb_{START + 5}.model" in commands[0]
    assert stand_in.newest("Limb") == OTHER
    assert stand_in.pending == []


def test_a_contribution_carries_the_dice_of_the_gate(
    stand_in: StandIn, models: Callable[..., Any], released: Path
) -> None:
    assert models("push", released, "--yes", "--contribute").exit_code == 0
    ((_, _, dice, data),) = stand_in.pending
    assert float(dice) == pytest.approx(0.6)
    assert data == released.read_bytes()
    assert stand_in.newest("Limb") == BASE


def test_nobody_to_ask_is_no_yes(
    stand_in: StandIn, models: Callable[..., Any], released: Path
) -> None:
    with pytest.raises(DafneFederatedError, match="expected --yes"):
        raise models("push", released).exception
    assert stand_in.requests == []


def merged(tmp_path: Path) -> Path:
    finished_run(tmp_path / "run")
    output = tmp_path / "run" / "release" / "merged.model"
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "-o", str(output)])
    assert done.exit_code == 0, done.exception
    return output


def moved(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "run")
    return (folder.release / folder.result().release).rename(tmp_path / "alone.model")


def ungated(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "run", gain=-0.1, gate="none")
    return folder.release / folder.result().release


def unlike(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "run")
    save_release_check(folder, ReleaseCheck(case="a", difference=0.02))
    return folder.release / folder.result().release


def foreign(tmp_path: Path) -> Path:
    (tmp_path / "foreign.model").write_bytes(BASE[:-1] + b".")
    return tmp_path / "foreign.model"


def failed(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "run", gain=-0.1)
    assert not folder.result().released
    output = folder.path / "release" / "merged.model"
    CliRunner().invoke(app, ["merge", str(folder.path), "-o", str(output)])
    return output


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (merged, "not the release of the run"),
        (failed, "the run released nothing: no state passed the gate"),
        (moved, "the folder of its run is not beside it"),
        (ungated, "released without a gate"),
        (unlike, "release check failed: .* 0.02"),
        (foreign, "no record of a run of this package"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_a_release_needs_force(
    stand_in: StandIn,
    models: Callable[..., Any],
    tmp_path: Path,
    make: Callable[[Path], Path],
    words: str,
) -> None:
    file = make(tmp_path)
    with pytest.raises(DafneFederatedError, match=words) as caught:
        raise models("push", file, "--yes").exception
    assert "--force" in str(caught.value)
    assert stand_in.newest("Limb") == BASE
    assert stand_in.requests == []
    if make is foreign:
        return
    done = models("push", file, "--yes", "--force")
    assert done.exit_code == 0, done.exception
    assert stand_in.newest("Limb") == file.read_bytes()


def test_a_file_that_was_moved_names_its_run(
    stand_in: StandIn, models: Callable[..., Any], tmp_path: Path
) -> None:
    file = moved(tmp_path)
    assert models("push", file, "--yes", "--run", tmp_path / "run").exit_code == 0
    assert stand_in.newest("Limb") == file.read_bytes()


def test_rolling_back_is_publishing_the_older_version_again(
    stand_in: StandIn, models: Callable[..., Any], released: Path, tmp_path: Path
) -> None:
    version = json.loads(models("push", released, "--yes", "--json").output)["version"]
    old = tmp_path / "old.model"
    assert models("pull", "Limb", "--version", START, "-o", old).exit_code == 0
    with pytest.raises(DafneFederatedError, match="expected --after VERSION"):
        raise models("push", old, "--yes", "--force").exception
    assert models("push", old, "--yes", "--force", "--after", START).exit_code == 3
    assert models("push", old, "--yes", "--force", "--after", version).exit_code == 0
    assert stand_in.newest("Limb") == BASE
    with pytest.raises(DafneFederatedError, match="only with --force"):
        raise models("push", released, "--yes", "--after", version).exception


def test_a_result_of_fine_tuning_is_a_release_of_its_own_run(
    stand_in: StandIn, models: Callable[..., Any], tmp_path: Path
) -> None:
    from dafne_federated.core.fine_tuning_folder import (
        FineTuningFolder,
        FineTuningInfo,
        FineTuningResult,
    )
    from dafne_federated.core.fine_tuning_settings import FineTuningSettings

    source = finished_run(tmp_path / "run")
    file = tmp_path / "Ours.model"
    file.write_bytes((source.release / source.result().release).read_bytes())
    folder = FineTuningFolder(tmp_path / "Ours.run")
    plan = source.plan()
    info = FineTuningInfo(
        run="1" * 32, created=START, base_name="Limb", base_digest=digest(BASE),
        given_digest=digest(BASE), base_parameters=2, plan_digest=plan.digest,
        settings=FineTuningSettings(), classification="", cases={}, persons={}, versions={},
        command="",
    )  # fmt: skip
    folder.begin(info, plan)
    result = FineTuningResult(
        written=True, reason="better", epoch=3, base_dice=0.5, dice=0.625, seconds={},
        digest=digest(b"another"),
    )  # fmt: skip
    folder.finish(result)
    with pytest.raises(DafneFederatedError, match="not the result of the run"):
        raise models("push", file, "--yes").exception
    folder.finish(result.model_copy(update={"digest": digest(file.read_bytes())}))
    assert models("push", file, "--yes", "--contribute").exit_code == 0
    assert float(stand_in.pending[0][2]) == 0.625


def test_help_has_examples() -> None:
    for command in ("list", "show", "pull", "push"):
        text = " ".join(CliRunner().invoke(app, ["models", command, "--help"]).output.split())
        assert f"Example: dafne-federated models {command}" in text


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (401, {"message": f"no such key: {KEY}"}),
        (422, {"detail": [{"input": {"api_key": KEY}}]}),
        (200, [{"message": KEY}, 500]),
        (200, {"latest_timestamp": {"api_key": KEY}}),
        (500, KEY.encode()),
    ],
    ids=str,
)
def test_a_failure_is_one_line_without_the_key(
    server: tuple[StandIn, str], tmp_path: Path, status: int, content: Any
) -> None:
    stand_in, address = server
    stand_in.answers["info_model"] = [(status, content)]
    (tmp_path / "key").write_text(KEY)
    done = subprocess.run(
        [sys.executable, "-m", "dafne_federated.cli.app", "models", "show", "Limb",
         "--server", address, "--key-file", "key"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert KEY not in done.stderr
    assert stand_in.requests[0][1]["api_key"] == KEY
