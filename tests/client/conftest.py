"""A site with its folder, spoken to as Flower would, for tests of the client."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from dafne_federated.client.app import app
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.handshake import own_versions
from dafne_federated.core.model_file import read_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.new_run import make_plan
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, initial_state
from dafne_federated.core.wire import (
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    RoundRequest,
    StatisticsRequest,
    array_record,
)
from dafne_federated.core.wire_arrays import state_record

RUN = "0" * 32


@pytest.fixture(scope="module")
def plan(trained: Any) -> AdaptationPlan:
    model = RunningModel(read_model(trained.path), trained.approvals)
    return make_plan(model, RunSettings(rank=2))


class SiteUnderTest:
    """A site with its folder, spoken to as Flower would."""

    def __init__(self, path: Path, data: Path, **changes: Any) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.path = path
        self.approvals = Approvals(path / "approved.json")
        settings = {
            "name": "clinic",
            "data": str(data),
            "training": ["clinic-0", "clinic-1"],
            "validation": ["clinic-2"],
            "cache": str(path / "cache"),
            "approvals": str(self.approvals.path),
            "threads": 2,
            "device": "cpu",
        } | changes
        (path / "site.json").write_text(json.dumps(settings))

    def ask(self, content: RecordDict, kind: str) -> RecordDict:
        message = Message(content, dst_node_id=5, message_type=kind)
        message.metadata.__dict__["_message_id"] = "m"
        config = {"site": str(self.path / "site.json")}
        context = Context(1, 5, config, RecordDict({}), {})
        reply = app(message, context)
        assert not reply.has_error()
        return reply.content

    def offer(self, plan: AdaptationPlan, changes: dict[str, Any] | None = None) -> OfferReply:
        offer = Offer(
            **own_versions(),
            run=RUN,
            base_digest=plan.base_digest,
            base_bytes=100,
            plan=plan.to_json(),
        ).model_copy(update=changes or {})
        return OfferReply.from_record(self.ask(offer.to_record(), "query.offer"))

    def send_base(self, data: bytes, digest: str) -> BaseReply:
        arrays = array_record({"base": np.frombuffer(data, np.uint8)})
        content = BaseModelBytes(run=RUN, base_digest=digest).to_record(arrays)
        return BaseReply.from_record(self.ask(content, "train.base"))

    def round(
        self,
        plan: AdaptationPlan,
        epochs: int = 1,
        state: State | None = None,
        sent_as: Any = None,
        **changes: Any,
    ) -> RecordDict:
        request = RoundRequest(
            run=RUN,
            round=1,
            base_digest=plan.base_digest,
            plan_digest=plan.digest,
            epochs=epochs,
            batch_size=4,
            learning_rate=0.01,
            seed=1,
        ).model_copy(update=changes)
        kind = "train.round" if epochs else "evaluate.state"
        arrays = state_record(plan, state or initial_state(plan, 0), sent_as or request.wire)
        return self.ask(request.to_record(arrays), kind)

    def statistics(self, plan: AdaptationPlan, what: str, number: int = 0, **more: Any) -> Any:
        """Return the content of the answer; ``more`` holds arrays by name, or a run."""
        request = StatisticsRequest.model_validate(
            {
                "run": more.pop("run", RUN),
                "base_digest": plan.base_digest,
                "plan_digest": plan.digest,
                "what": what,
                "number": number,
            }
        )
        return self.ask(request.to_record(array_record(more)), "query.statistics")


MakeSite = Callable[..., SiteUnderTest]


@pytest.fixture
def make_site(tmp_path: Path, squares_folder: Path) -> MakeSite:
    def make(**changes: Any) -> SiteUnderTest:
        return SiteUnderTest(tmp_path, squares_folder, **changes)

    return make


@pytest.fixture
def ready(make_site: MakeSite, plan: AdaptationPlan, trained: Any) -> SiteUnderTest:
    """A site that approved and has the base."""
    site = make_site()
    site.approvals.add(read_model(trained.path), "test")
    assert site.offer(plan).status == "need"
    assert site.send_base(trained.path.read_bytes(), plan.base_digest).status == "stored"
    assert site.offer(plan).status == "have"
    return site
