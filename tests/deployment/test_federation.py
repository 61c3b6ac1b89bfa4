"""A federation between processes with TLS and keys: it ends in a release, and refuses the rest."""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.client import work_starter  # noqa: E402
from dafne_federated.client.deployment_folder import SiteFolder  # noqa: E402
from dafne_federated.core.errors import RunError  # noqa: E402
from dafne_federated.core.flower_bundle import write_app  # noqa: E402
from dafne_federated.core.flower_command import CONNECTION, flwr  # noqa: E402
from dafne_federated.core.model_file import read_model, write_model  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.supervision import supervisor  # noqa: E402
from dafne_federated.server.deployment_folder import ServerSettings, make_server  # noqa: E402
from dafne_federated.server.deployment_runs import FlowerRun  # noqa: E402
from dafne_federated.server.run_following import watch  # noqa: E402
from tests.deployment.bad_network import BadNetwork  # noqa: E402
from tests.deployment.deployed import Deployment, descendants, wait_for  # noqa: E402
from tests.deployment.faults import Stage  # noqa: E402


def prepared(deployment: Deployment) -> dict[str, int]:
    """Return by site how many cases its program has read so far."""
    return {
        name: len(list(site.settings.cache.glob("slices/*.npz")))
        for name, site in deployment.sites.items()
    }


@pytest.fixture(scope="module")
def refused(deployment: Deployment, trained: Any) -> "subprocess.CompletedProcess[str]":
    """The first run: the base is approved at one site only."""
    clinic = deployment.sites["clinic"]
    deployment.done("site", "approve", clinic.path, trained.path, "--yes")
    return deployment.command(
        *("server", "run", deployment.server.path, "--base", trained.path, "--name", "first"),
        *("--settings", "settings.toml", "--quiet"),
    )


@pytest.fixture(scope="module")
def finished(deployment: Deployment, refused: object) -> RunFolder:
    """The same run after the other site has approved the base."""
    hospital = deployment.sites["hospital"]
    (waiting,) = hospital.settings.inbox.glob("*.model")
    deployment.done("site", "approve", hospital.path, waiting.stem[:12], "--yes")
    said = deployment.done("server", "resume", deployment.server.path, "first", "--quiet")
    assert re.findall(r"round \d: 2 of 2 sites", said) == [
        f"round {number}: 2 of 2 sites" for number in (1, 2, 3)
    ]
    return deployment.run("first")


def test_only_the_paths_of_sites_lead_through_the_gateway(
    deployment: Deployment, tmp_path: Path
) -> None:
    url = f"https://localhost:{deployment.port}"
    trusting = ssl.create_default_context(cafile=str(deployment.server.authority))
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/health", "/docs"):
        assert httpx.post(url + path, verify=trusting).status_code == 404
    # Without the key of a registered site the SuperLink itself refuses what passes.
    headers = {"content-type": "application/protobuf"}
    answer = httpx.post(f"{url}/v1/fleet/pull-messages", verify=trusting, headers=headers)
    assert answer.status_code in (400, 401, 403)
    other = make_server(tmp_path / "other", ServerSettings(hosts=("localhost",)))
    foreign = ssl.create_default_context(cafile=str(other.authority))
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.post(url, verify=foreign)


def test_a_base_that_a_site_did_not_approve_is_refused_and_can_be_looked_at(
    deployment: Deployment, refused: "subprocess.CompletedProcess[str]"
) -> None:
    assert refused.returncode == 1
    words = r"expected at least 2 sites, got 1; hospital: base model \w{16} waits for approval at"
    assert re.search(words, refused.stderr)
    assert "server resume" in refused.stderr
    assert not deployment.run("first").rounds()


def test_the_run_ends_in_a_release_that_dafne_opens(finished: RunFolder) -> None:
    from dafne_dl.model_loaders import generic_load_model

    result = finished.result()
    assert result.released, result.reason
    with (finished.release / result.release).open("rb") as file:
        model = generic_load_model(file, install_deps=False)
    assert model.model_id == read_model(finished.base).model_id
    assert all(line.sites.keys() == {"clinic", "hospital"} for line in finished.rounds())
    for kept in (finished.path / "run.json").parent.rglob("*.json*"):
        assert "data-clinic" not in kept.read_text()  # no path of a site arrived here


def test_sites_tell_their_people_what_runs(deployment: Deployment, finished: RunFolder) -> None:
    hospital = deployment.sites["hospital"]
    said = deployment.done("site", "status", hospital.path)
    assert "approved:  1" in said
    assert "waiting:   0" in said
    said = deployment.done("server", "status", deployment.server.path)
    assert "sites: 2 of 2 online" in said
    assert "run: first, finished, released" in said


def test_a_doctored_base_of_the_same_name_is_refused_and_the_change_shown(
    deployment: Deployment, finished: RunFolder, tmp_path: Path
) -> None:
    before, base = prepared(deployment), read_model(finished.base)
    marker = tmp_path / "it-ran"
    source = base.functions["init_model_function"] or ""
    evil = source.replace("):\n", f"):\n    open({str(marker)!r}, 'a').close()\n", 1)
    functions = {**base.functions, "init_model_function": evil}
    doctored = tmp_path / "base.model"
    write_model(replace(base, functions=functions), doctored)
    deployment.done("approve", doctored, "--yes")
    stopped = deployment.command(
        *("server", "run", deployment.server.path, "--base", doctored, "--name", "doctored"),
        *("--settings", "settings.toml", "--quiet"),
    )
    assert stopped.returncode == 1
    assert stopped.stderr.count("waits for approval at this site") == 2
    marker.unlink()  # the coordinator approved it, and built its network for the plan
    said = deployment.done("site", "approvals", deployment.sites["clinic"].path)
    assert "other than in Squares" in said
    assert "1 lines new, 0 gone" in said
    assert "it-ran" in said
    assert not marker.exists()
    assert prepared(deployment) == before


def coded_run(
    deployment: Deployment, finished: RunFolder, name: str, marker: Path, deadline: float
) -> RunFolder:
    """Start a run whose bundle holds a program that would leave ``marker`` behind."""
    server, known = deployment.server, finished.info()
    settings = known.settings.model_copy(update={"deadline": deadline})
    info = known.model_copy(update={"run": uuid.uuid4().hex, "settings": settings})
    run = RunFolder.create(server.run_path(name), info, finished.plan(), finished.base.read_bytes())
    with tempfile.TemporaryDirectory(prefix="coded-") as folder:
        write_app(Path(folder), run.path)
        project = Path(folder) / "pyproject.toml"
        project.write_text(project.read_text().replace('["README.md"]', '["**/*.py"]'))
        for package in ("dafne_federated", "dafne_federated/client"):
            (Path(folder) / package).mkdir()
        code = f"open({str(marker)!r}, 'a').close()\nfrom flwr.clientapp import ClientApp\n"
        (Path(folder) / "dafne_federated/client/app.py").write_text(f"{code}app = ClientApp()\n")
        started = flwr(["run", folder, CONNECTION], server.environment, server.home)
    number = FlowerRun(run_id=str(started["run-id"]))
    (run.path / "flower.json").write_text(number.model_dump_json())
    return run


def test_a_bundle_with_code_is_refused_and_no_bundle_is_unpacked(
    deployment: Deployment, finished: RunFolder, tmp_path: Path
) -> None:
    marker, server = tmp_path / "it-ran", deployment.server
    run = coded_run(deployment, finished, "coded", marker, 300.0)
    words = "declined: the bundle holds more than configuration"
    with pytest.raises(RunError, match=f"clinic: {words}; hospital: {words}"):
        list(watch(server, run, 0))
    assert not marker.exists()
    for site in deployment.sites.values():
        assert "more than configuration: ['dafne_federated/client/app.py'" in (
            site.refusals.read_text()
        )
        assert not (site.home / "apps").exists()  # not even the bundles of other runs
        assert "refused: the bundle holds" in deployment.done("site", "status", site.path)


def checked(deployment: Deployment, site: SiteFolder) -> dict[str, tuple[str, str]]:
    found = json.loads(deployment.command("site", "check", site.path, "--json").stdout)
    return {one["name"]: (one["status"], one["found"]) for one in found}


def test_a_site_that_takes_part_is_checked_while_it_runs(
    deployment: Deployment, finished: RunFolder
) -> None:
    found = checked(deployment, deployment.sites["clinic"])
    assert found["key"] == ("ok", "registered with the coordinator")
    assert {status for status, _ in found.values()} <= {"ok", "warn"}
    assert any(name.startswith("step of Squares") for name in found)
    assert deployment.done("server", "sites", deployment.server.path).count("online") == 2


def test_a_key_that_is_not_registered_and_a_foreign_coordinator_come_to_nothing(
    deployment: Deployment, tmp_path: Path
) -> None:
    other = make_server(tmp_path / "other", ServerSettings(hosts=("localhost",)))
    data = deployment.path / "data-clinic"
    stranger = deployment.make_site("stranger", data)
    assert checked(deployment, stranger)["key"] == ("fail", "not registered with the coordinator")
    deceived = deployment.make_site("deceived", data, other.authority)
    words = {stranger: "Failed to activate", deceived: "CERTIFICATE_VERIFY_FAILED"}
    started = [deployment.started("site", "start", site.path) for site in words]
    try:
        for site, expected in words.items():
            log = site.logs / "node.log"
            wait_for(lambda log=log, words=expected: log.exists() and words in log.read_text())
    finally:
        for site, process in zip(words, started, strict=True):
            deployment.done("site", "stop", site.path)
            process.wait()
    listed = deployment.done("server", "sites", deployment.server.path)
    assert (listed.count("online"), "stranger" in listed) == (2, False)


def kill_in_round_two(deployment: Deployment, run: RunFolder, program: str, before: int) -> int:
    """Kill ``program`` as soon as round 2 begins after ``before`` events; return how many now."""

    def begun() -> int:
        events = list(run.events())
        new = any(e["event"] == "round started" and e["round"] == 2 for e in events[before:])
        return len(events) if new else 0

    seen: int = wait_for(begun, 400)
    number = supervisor(deployment.server.lock)
    assert number is not None
    (found,) = (n for n, c in descendants(number).items() if program in c)
    os.kill(found, signal.SIGKILL)
    return seen


def test_a_run_goes_on_after_kills_and_ends_in_the_same_bits(
    deployment: Deployment, finished: RunFolder, trained: Any
) -> None:
    server, run = deployment.server, deployment.run("killed")
    command = deployment.started(
        *("server", "run", server.path, "--base", trained.path, "--name", "killed"),
        *("--settings", "settings.toml", "--quiet"),
    )
    wait_for(lambda: any(event["event"] == "started" for event in run.events()), 120)
    command.kill()  # who follows a run can be spared
    command.wait()
    command = deployment.started("server", "resume", server.path, "killed", "--quiet")
    seen = kill_in_round_two(deployment, run, "flwr-serverapp", 0)
    kinds = [event["event"] for event in run.events()]
    assert kinds.count("launched") == 1, deployment.told()  # it was found under way
    kill_in_round_two(deployment, run, "flower-superlink", seen)
    assert command.wait(900) == 0, deployment.told()
    assert "it is started again" in (deployment.path / "output.log").read_text()
    assert run.result().content_digest == finished.result().content_digest
    assert [line.state_digest for line in run.rounds()] == [
        line.state_digest for line in finished.rounds()
    ]


def test_a_run_bears_what_goes_wrong_between_hospitals(
    deployment: Deployment, network: BadNetwork, finished: RunFolder, trained: Any
) -> None:
    server, stage = deployment.server, Stage(deployment, network, deployment.run("borne"))
    clinic, hospital = (deployment.sites[name].lock for name in ("clinic", "hospital"))
    stage.command = deployment.started(
        *("server", "run", server.path, "--base", trained.path, "--name", "borne"),
        *("--settings", "settings.toml", "--quiet"),
    )
    network.reset = 0.01

    def begins(number: int) -> None:
        event = "members" if number == 0 else "round started"
        wait_for(
            lambda: any(
                e["event"] == event and e.get("round", 0) == number for e in stage.run.events()
            ),
            400,
        )

    begins(0)
    kills = [stage.kill(server.lock, "server.gateway")]
    begins(1)
    kills.append(stage.kill(clinic, "client.guard"))
    kills.append(stage.kill(hospital, "client.node"))
    begins(2)
    kills.append(stage.kill(clinic, "client.work_starter"))
    kills.append(stage.kill(server.lock, "flower-superexec"))
    assert all(kill.startswith("killed") for kill in kills), kills
    assert stage.command.wait(900) == 0, deployment.told()
    stage.mend()
    assert stage.run.result().content_digest == finished.result().content_digest


def test_a_federation_goes_on_when_cases_come(
    deployment: Deployment, finished: RunFolder, trained: Any
) -> None:
    server, run = deployment.server, deployment.run("going")
    settings = {name: site.settings_file for name, site in deployment.sites.items()}
    whole = {name: file.read_text() for name, file in settings.items()}

    def versions_ended() -> int:
        return sum(event["event"] == "version finished" for event in run.events())

    try:
        for name, file in settings.items():
            file.write_text(whole[name].replace(f'    "{name}-1",\n', ""))
        command = deployment.started(
            *("server", "run", server.path, "--base", trained.path, "--name", "going"),
            *("--settings", "settings.toml", "--rounds", 1, "--continuous", "--ask-every", 2),
            "--quiet",
        )
        wait_for(lambda: run.path.exists() and versions_ended() == 1, 300)
        for name, file in settings.items():
            file.write_text(whole[name])
        wait_for(lambda: versions_ended() == 2, 300)
    finally:
        for name, file in settings.items():
            file.write_text(whole[name])
    deployment.done("server", "stop", server.path, "going")
    assert command.wait(60) == 1  # it was stopped
    said = deployment.done("server", "history", server.path)
    assert "generation 1: going, base Squares" in said
    assert ["clinic 1, hospital 1" in said, "clinic 2, hospital 2" in said] == [True, True]
    assert deployment.done("server", "status", server.path).count("clinic 2, hospital 2") == 1


def test_a_site_that_is_revoked_is_sent_away_and_its_key_stays_out(
    deployment: Deployment, finished: RunFolder
) -> None:
    server, clinic = deployment.server, deployment.sites["clinic"]
    deployment.done("server", "revoke", server.path, "clinic")
    wait_for(
        lambda: "clinic               online" not in deployment.done("server", "sites", server.path)
    )
    again = deployment.command(
        "server", "register", server.path, "clinic", clinic.request_file("clinic")
    )
    assert (again.returncode, "this key was registered before" in again.stderr) == (1, True)
    assert [site["name"] for site in json.loads(server.sites.read_text())] == ["clinic", "hospital"]


def test_where_the_guard_vanishes_while_a_site_runs_nothing_runs(
    deployment: Deployment, finished: RunFolder, tmp_path: Path
) -> None:
    installed = work_starter.GUARD.parent.parent
    for folder in ("cli", "client", "core", "server", "simulations", "strategies"):
        shutil.copytree(installed / folder, tmp_path / "copy/dafne_federated" / folder)
    practice = deployment.make_site("practice", deployment.path / "data-clinic")
    server, request = deployment.server, practice.request_file("practice")
    deployment.done("server", "register", server.path, "practice", request)
    copied = replace(
        deployment, environment=deployment.environment | {"PYTHONPATH": str(tmp_path / "copy")}
    )
    process = copied.started("site", "start", practice.path)
    try:
        words = "practice             online"
        wait_for(lambda: words in deployment.done("server", "sites", server.path), 120)
        (tmp_path / "copy/dafne_federated/client/guard.py").unlink()
        run = coded_run(deployment, finished, "unguarded", tmp_path / "it-ran", 20.0)
        said = "practice: no answer within 20 s"
        with pytest.raises(RunError, match=said):
            list(watch(server, run, 0))
        assert "refused:" in (status := deployment.done("site", "status", practice.path))
        assert "client/guard.py is missing" in status
    finally:
        deployment.done("site", "stop", practice.path)
        process.wait()
    assert not (tmp_path / "it-ran").exists()
