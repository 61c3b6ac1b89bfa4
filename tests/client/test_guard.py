"""A site looks at every bundle, unpacks none, and runs the program that is installed."""

import inspect
import io
import json
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from dafne_federated.client.guard import REPLACED, installed_loader, look_at_bundle
from dafne_federated.client.refusals import REFUSALS
from dafne_federated.core.flower_bundle import write_app
from dafne_federated.core.handshake import own_versions
from dafne_federated.core.wire import Offer, OfferReply


def test_flower_unpacks_and_loads_by_the_names_that_the_guard_replaces() -> None:
    source = inspect.getsource(run_clientapp.run_clientapp)
    for name in REPLACED:
        assert source.count(f"{name}(") == 1
        assert callable(getattr(run_clientapp, name))
    assert source.index("install_from_fab(") < source.index("get_load_client_app_fn(")
    assert "client_app(message=message, context=context)" in source
    # What goes wrong becomes a fixed text: nothing of it reaches the server.
    assert "isinstance(ex, LoadClientAppError)" in source


OFFER = Offer(
    **own_versions(), run="0" * 32, base_digest="a" * 64, base_bytes=10, plan="{}"
).to_record()


def asking(tmp_path: Path) -> Callable[..., Any]:
    """Return what asks the installed program, as Flower would, what the guard lets it answer."""
    settings = {"name": "clinic", "data": "d", "training": [], "validation": []}
    settings |= {"cache": str(tmp_path / "cache"), "approvals": str(tmp_path / "approved.json")}
    (tmp_path / "site.json").write_text(json.dumps(settings))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    config = {"site": str(tmp_path / "site.json")}

    def answer(content: RecordDict, kind: str) -> Any:
        message = Message(content, dst_node_id=5, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        load = installed_loader(default_app_ref="os:system", app_path="/tmp", multi_app=True)
        context = Context(1, 5, dict(config), RecordDict({}), {})
        reply = load("other/app", "1.0", "0" * 64)(message=message, context=context)
        assert context.node_config == config  # Flower keeps it for the next message
        return reply.content

    return answer


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Any]:
    return asking(tmp_path)


def good_bundle() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_app(Path(folder), Path(folder))
        return bundle(pyproject__toml=(Path(folder) / "pyproject.toml").read_text())


def bundle(**files: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "."), text)
    return made.getvalue()


def test_a_refused_bundle_is_noted_and_the_server_is_told_in_fixed_words(
    ask: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(REFUSALS, str(tmp_path / "refusals.log"))
    look_at_bundle(bundle(evil__py="", pyproject__toml=""), skip_prompt=True)
    noted = (tmp_path / "refusals.log").read_text()
    assert noted.endswith("refused: the bundle holds more than configuration: ['evil.py']\n")
    assert capfd.readouterr().err == noted
    reply = OfferReply.from_record(ask(OFFER, "query.offer"))
    words = "declined: the bundle holds more than configuration"
    assert (reply.status, reply.site, reply.reason) == ("refused", "clinic", words)
    look_at_bundle(b"anything")
    reply = OfferReply.from_record(ask(OFFER, "query.offer"))
    assert reply.reason == "declined: the bundle is damaged"


def test_the_installed_program_answers_whatever_is_named(ask: Callable[..., Any]) -> None:
    look_at_bundle(good_bundle())
    reply = OfferReply.from_record(ask(OFFER, "query.offer"))
    assert (reply.status, "plan" in reply.reason) == ("refused", True)


def test_no_text_of_an_exception_is_handed_to_flower(ask: Callable[..., Any]) -> None:
    with pytest.raises(LoadClientAppError, match=r"^the site's program ended$"):
        ask(OFFER, "query.unheard_of")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_told_to_end_answers_first_and_ends_at_the_second_word(
    kind: signal.Signals,
) -> None:
    code = """
import time
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supercore.telemetry import EventType
from dafne_federated.client.guard import end_with_an_answer
end_with_an_answer(event_type=EventType.FLWR_CLIENTAPP_RUN_LEAVE, exit_handlers=[])
for wait in range(2):
    try:
        print("works", flush=True)
        time.sleep(60)
    except LoadClientAppError as error:
        print(error, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for expected in ("works", "the site's program was told to end", "works"):
        assert process.stdout.readline().strip() == expected
        if expected == "works":
            process.send_signal(kind)
    assert process.wait(10) == -kind
    process.stdout.close()


def test_what_asks_only_for_consent_is_answered_without_loading_tensorflow(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from dafne_federated.core.news import QUERY_NEWS, NewsReply, NewsRequest
from tests.client.test_guard import *
ask = asking(pathlib.Path(sys.argv[1]))
look_at_bundle(b"")
print(OfferReply.from_record(ask(OFFER, "query.offer")).reason)
look_at_bundle(good_bundle())
from flwr.app import ConfigRecord
other = dict(OFFER["message"]) | {"keras": "1.0.0", "protocol": 7}
offer = RecordDict({"message": ConfigRecord(other)})
print(OfferReply.from_record(ask(offer, "query.offer")).reason)
news = NewsRequest(base_digest="a" * 64).to_record()
print(NewsReply.from_record(ask(news, QUERY_NEWS)).reason)
print(sorted({"keras", "tensorflow", "dafne_dl"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    damaged, versions, news, loaded = done.stdout.splitlines() or [done.stderr] * 4
    assert damaged == "declined: the bundle is damaged"
    assert versions.startswith("versions differ: protocol 1 at this site and 7 at the coordinator")
    assert "and 1.0.0 at the coordinator" in versions
    assert news == "base model aaaaaaaaaaaaaaaa is not approved at this site"
    assert loaded == "[]"
