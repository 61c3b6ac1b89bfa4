"""A federation of make-believe sites in this process, for tests of the server alone."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dafne_stand_in import KEY, StandIn
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from pydantic import SecretStr

from dafne_federated.core.files import sha256
from dafne_federated.core.handshake import own_versions
from dafne_federated.core.moments import moments
from dafne_federated.core.news import NewsReply, NewsRequest
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
    StatisticsReply,
    StatisticsRequest,
)
from dafne_federated.core.wire_arrays import state_record, take_arrays, take_bytes, take_state
from dafne_federated.server.dafne_connection import DafneConnection
from dafne_federated.server.rounds import run_rounds

BASE = b"the bytes of a base"
SLICES = {"site-a": 3, "site-b": 5, "site-c": 2}
BOTH = {"statistics": "pooled", "class_weights": "pooled"}


def base_bytes(plan: AdaptationPlan) -> bytes:
    generator = np.random.default_rng(7)
    weights = [np.zeros(1, np.float32) for _ in range(14)]
    for target in plan.targets:
        values = np.abs(generator.normal(size=target.shape)) + 0.1
        weights[int(target.key)] = values.astype(np.float32)
    content = {
        "model_id": "family",
        "weights": weights,
        "timestamp_id": 1_610_001_000,
        "is_delta": False,
        "data_dimensionality": 2,
        "type": "DynamicDLModel",
        "metadata": {"model_name": "Thigh", "categories": [["MSK"]], "variants": [""]},
        "init_model_function": "def init():\n    pass\n",
        "apply_model_function": "def apply(model, data):\n    return {}\n",
        "incremental_learn_function": "def learn(*args):\n    pass\n",
    }
    return pickle.dumps(content, protocol=4)


def changed(plan: AdaptationPlan, *differences: float) -> Any:
    """Return what a site says of two persons, one who chooses and one who accepts.

    It is the same of both and of all labels, for each state that was compared with.
    """
    totals = [value for value in differences for _ in range(2 * len(plan.labels))]
    return {
        "change_persons": [1] * len(totals),
        "change_total": totals,
        "change_squares": [value**2 for value in totals],
    }


def stop_in(group: object) -> Callable[[Message, RecordDict], RecordDict]:
    """Return what makes a site stop the whole run when it is asked in a round."""

    def change(message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.group_id == str(group):
            raise KeyboardInterrupt
        return content

    return change


class PretendSite:
    """Answers as a site would; ``change`` may spoil any answer."""

    def __init__(self, name: str, plan: AdaptationPlan, has_base: bool = False) -> None:
        self.name, self.plan, self.has_base = name, plan, has_base
        self.change: Callable[[Message, RecordDict], Any] = lambda _, content: content
        self.received: list[str] = []
        self.base_dice = 0.55
        self.rank: int | None = None
        self.ranks: list[int] = []  # of what came
        self.cases = 3
        self.trained: dict[str, int] = {}  # with how many cases, by run

    def __call__(self, message: Message) -> Any:
        kind = message.metadata.message_type
        self.received.append(kind)
        if kind == "query.offer":
            content = OfferReply(
                **own_versions(),
                site=self.name,
                status="have" if self.has_base else "need",
                training_cases=self.cases,
                validation_cases=1,
                rank=self.rank,
            ).to_record()
        elif kind == "query.news":
            asked = NewsRequest.from_record(message.content)
            content = NewsReply(
                site=self.name,
                base_digest=asked.base_digest,
                status="ok",
                new_cases=self.cases - self.trained.get(asked.since or "", 0),
            ).to_record()
        elif kind == "query.alive":
            content = RecordDict({})
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
        if request.epochs:
            self.trained[request.run] = self.cases
        level = min(0.5 + 0.05 * request.round, 1.0)
        before = [self.first(message)] if request.first else []
        reply = RoundReply(
            run=request.run,
            round=request.round,
            site=self.name,
            base_digest=request.base_digest,
            plan_digest=request.plan_digest,
            status="ok",
            training_cases=self.cases if request.epochs else 0,
            dice=[level] * len(self.plan.labels),
            dice_cases=[1] * len(self.plan.labels),
            **changed(self.plan, *(level - old for old in (*before, self.base_dice))),
        )
        return reply.to_record(
            state_record(self.plan, new, request.wire) if request.epochs else None
        )

    def first(self, message: Message) -> float:
        """Measure the state that a run started from."""
        arrays = RecordDict({"arrays": message.content.array_records["first"]})
        take_state(arrays, self.plan)
        return self.base_dice


class SharingSite(PretendSite):
    """A site with values of its own behind each normalisation."""

    def __init__(self, name: str, plan: AdaptationPlan) -> None:
        super().__init__(name, plan, has_base=False)
        self.shares = True
        self.requests: list[RoundRequest] = []
        count = SLICES[name]
        generator = np.random.default_rng(count)
        offset = 20 * generator.normal()
        self.values = [
            offset + generator.normal(size=(count, 6, mean.shape[0]))
            for mean, _ in plan.normalisations
        ]
        labels = generator.integers(0, 2 if name == "site-c" else 3, (count, 8, 8))
        self.counts = [int((labels == c).sum()) for c in range(3)]
        self.holding = [int((labels == c).any(axis=(1, 2)).sum()) for c in range(3)]

    def __call__(self, message: Message) -> Any:
        kind = message.metadata.message_type
        if kind == "train.base":
            self.received.append(kind)
            assert sha256(take_bytes(message.content, "base", 10_000)) == self.plan.base_digest
            return self.change(message, BaseReply(site=self.name, status="stored").to_record())
        if kind != "query.statistics":
            return super().__call__(message)
        self.received.append(kind)
        return self.change(message, self.share(message))

    def share(self, message: Message) -> RecordDict:
        request = StatisticsRequest.from_record(message.content)
        fields: dict[str, Any] = request.model_dump(exclude={"protocol"}) | {"site": self.name}
        if not self.shares:
            reason = "this site does not share statistics"
            return StatisticsReply(**fields, status="withheld", reason=reason).to_record()
        fields |= {"status": "ok", "slices": SLICES[self.name]}
        if request.what == "classes":
            return StatisticsReply(
                **fields, class_pixels=self.counts, class_slices=self.holding
            ).to_record()
        shapes = self.plan.statistics_shapes(request.number)
        given = take_arrays(message.content, shapes)
        # As in a network: what comes next depends on the new statistics in front of it.
        shift = sum(float(array.sum()) for array in given.values())
        found = moments(shift + self.values[request.number])
        arrays = {"mean": found.mean, "variance": found.variance}
        return StatisticsReply(**fields).to_record(arrays)

    def round(self, message: Message) -> RecordDict:
        request = RoundRequest.from_record(message.content)
        self.requests.append(request)
        state = take_state(message.content, self.plan, request.wire)
        sent = state_record(self.plan, state, request.wire)
        content = super().round(message)
        if request.epochs:
            for key in self.plan.state_shapes(trained=False):
                content.array_records["arrays"][key] = sent[key]
        return content


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
                {"rounds": 3, "min_sites": 2, "min_persons": 1, "wait": 1} | settings
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


@pytest.fixture
def new_pool(
    tmp_path: Path, new_run: Callable[..., RunFolder], statistics_plan: AdaptationPlan
) -> Callable[..., RunFolder]:
    """A function that makes a run with a real base and ``statistics_plan``."""
    numbers = itertools.count()

    def make(**settings: Any) -> RunFolder:
        base = base_bytes(statistics_plan)
        bound = {key: settings[key] for key in ("max_rank",) if key in settings}
        plan = statistics_plan.model_copy(update={"base_digest": sha256(base)} | bound)
        info = new_run(**settings).info()
        info = info.model_copy(update={"base_digest": plan.base_digest, "plan_digest": plan.digest})
        return RunFolder.create(tmp_path / f"pool{next(numbers)}", info, plan, base)

    return make


def grid_of(folder: RunFolder, names: str = "abc", **options: Any) -> PretendGrid:
    return PretendGrid([SharingSite(f"site-{n}", folder.plan()) for n in names], **options)


def run_with_stops(make_grid: Callable[..., Any], folder: RunFolder, stops: Iterable[int]) -> None:
    """Run to the end, stopped at the second site in each of the rounds ``stops`` before."""
    for last in (*stops, None):
        grid = make_grid(folder)
        list(grid.sites.values())[1].change = stop_in(last)
        if last:
            with pytest.raises(KeyboardInterrupt):
                run_rounds(grid, folder)
        else:
            run_rounds(grid, folder)


@pytest.fixture
def stand_in(server: Any) -> StandIn:
    """Return the stand-in of a module's own ``server``: with its models, beside its address."""
    return server[0]


@pytest.fixture
def connection(server: Any) -> Iterator[DafneConnection]:
    """Yield a connection to a module's own ``server``."""
    with DafneConnection(server[1], SecretStr(KEY), first_pause=0.01) as connection:
        yield connection
