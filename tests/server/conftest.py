"""A federation of make-believe sites in this process, for tests of the server alone."""

import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from dafne_federated.core.files import sha256
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import state_rank, without_factors
from dafne_federated.core.versions import software_version
from dafne_federated.core.wire import (
    BaseReply,
    OfferReply,
    RoundReply,
    RoundRequest,
)
from dafne_federated.core.wire_arrays import state_record, take_bytes, take_state

BASE = b"the bytes of a base"


class PretendSite:
    """Answers as a site would; ``change`` may spoil any answer."""

    def __init__(self, name: str, plan: AdaptationPlan, has_base: bool = False) -> None:
        self.name, self.plan, self.has_base = name, plan, has_base
        self.change: Callable[[Message, RecordDict], Any] = lambda _, content: content
        self.received: list[str] = []
        self.rank: int | None = None
        self.ranks: list[int] = []  # of what came

    def __call__(self, message: Message) -> Any:
        kind = message.metadata.message_type
        self.received.append(kind)
        if kind == "query.offer":
            content = OfferReply(
                software=software_version(),
                site=self.name,
                status="have" if self.has_base else "need",
                training_cases=3,
                validation_cases=1,
                rank=self.rank,
            ).to_record()
        elif kind == "train.base":
            assert take_bytes(message.content, "base", 100) == BASE
            self.has_base = True
            content = BaseReply(site=self.name, status="stored").to_record()
        else:
            content = self.round(message)
        return self.change(message, content)

    def round(self, message: Message) -> RecordDict:
        request = RoundRequest.from_record(message.content)
        state = take_state(message.content, self.plan, request.wire)
        self.ranks.append(state_rank(self.plan, state))
        # A deterministic "training": a step that follows from site and round.
        generator = np.random.default_rng([len(self.name), ord(self.name[-1]), request.round])
        held = tuple(f"/{part}" for part in request.rule.held)
        new = {
            k: v if k.endswith(held) else v + step * generator.normal(size=v.shape).astype("f4")
            for k, v in state.items()
            for step in (np.float32(0.1),)
        }
        new = without_factors(new, request.rule.absent)
        level = min(0.5 + 0.05 * request.round, 1.0)
        reply = RoundReply(
            run=request.run,
            round=request.round,
            site=self.name,
            base_digest=request.base_digest,
            plan_digest=request.plan_digest,
            status="ok",
            training_cases=3 if request.epochs else 0,
            dice=[level] * len(self.plan.labels),
            dice_cases=[1] * len(self.plan.labels),
        )
        return reply.to_record(state_record(new, request.wire) if request.epochs else None)


class PretendGrid(Grid):
    """Hands messages to pretend sites; ``order`` sets in which order answers arrive."""

    def __init__(self, sites: list[PretendSite], order: Callable[[list[str]], list[str]] = list):
        self.sites = {10 + i: site for i, site in enumerate(sites)}
        self.order = order
        self._numbers = itertools.count()
        self._replies: dict[str, Message] = {}
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    run = property(lambda self: None)

    def set_run(self, run: Any) -> None: ...

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def get_nodes(self) -> Any:
        return [SimpleNamespace(node_id=i, name="") for i in self.sites]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity = f"m{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = identity
            identities.append(identity)
            incoming = copy.deepcopy(message)
            answer = self.sites[message.metadata.dst_node_id](incoming)
            if isinstance(answer, (RecordDict, Error)):
                self._replies[identity] = Message(answer, reply_to=incoming)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = self.order([i for i in message_ids if i in self._replies])
        return [self._replies.pop(i) for i in ready[:1]]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError


@pytest.fixture
def new_run(tmp_path: Path, small_plan: AdaptationPlan) -> Callable[..., RunFolder]:
    """A function that makes a run folder with ``small_plan`` and the given settings."""
    numbers = itertools.count()

    def make(**settings: Any) -> RunFolder:
        bound = {key: settings[key] for key in ("max_rank",) if key in settings}
        plan = small_plan.model_copy(update={"base_digest": sha256(BASE)} | bound)
        info = RunInfo(
            run="0" * 32,
            created=1_800_000_000,
            base_digest=plan.base_digest,
            base_name="Base",
            plan_digest=plan.digest,
            settings=RunSettings.model_validate(
                {"rounds": 3, "min_sites": 2, "wait": 1} | settings
            ),
            versions={"dafne-federated": software_version()},
            command="test",
        )
        return RunFolder.create(tmp_path / f"run{next(numbers)}", info, plan, BASE)

    return make


@pytest.fixture
def make_grid() -> Callable[..., PretendGrid]:
    """A function that makes a grid of pretend sites by name."""

    def make(folder: RunFolder, names: str = "abc", **options: Any) -> PretendGrid:
        sites = [PretendSite(f"site-{n}", folder.plan()) for n in names]
        return PretendGrid(sites, **options)

    return make
