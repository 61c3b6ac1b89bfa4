"""Messages survive the trip, and bad ones are refused by name before anything is parsed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from dafne_federated.core.errors import MessageError, StateError
from dafne_federated.core.plan import AdaptationPlan, WireType
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State
from dafne_federated.core.wire import (
    BaseModelBytes,
    BaseReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
    array_record,
    record_bytes,
)
from dafne_federated.core.wire_arrays import rounded, state_record, take_bytes, take_state

SHA = "a" * 64
VERSIONS = {"software": "0.1.0", "flower": "1.41.0", "keras": "3.1.0", "tensorflow": "2.21.0"}
RUN = "0" * 32
MESSAGES = [
    Offer(**VERSIONS, run=RUN, base_digest=SHA, base_bytes=10, plan="{}"),
    OfferReply(**VERSIONS, site="A", status="need", training_cases=3, validation_cases=0),
    BaseModelBytes(run=RUN, base_digest=SHA),
    BaseReply(site="A", status="refused", reason="not approved"),
    RoundRequest(
        run=RUN, round=1, base_digest=SHA, plan_digest=SHA, epochs=0, batch_size=1,
        learning_rate=0.1, seed=0,
    ),
    RoundReply(
        run=RUN, round=1, site="A", base_digest=SHA, plan_digest=SHA, status="ok",
        training_cases=3, loss=0.25, dice=[0.5, 1.0], dice_cases=[2, 0],
    ),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Any) -> None:
    assert type(message).from_record(message.to_record()) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_flower_can_carry_every_record(message: Any) -> None:
    for record in message.to_record().values():
        kind = type(record)
        assert kind.inflate(record.deflate(), {}) == record


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_unknown_and_missing_fields_and_other_protocols_are_refused(message: Any) -> None:
    kind = type(message)
    for change, words in (
        ({"colour": 1}, "colour"),
        ({"protocol": 2}, "protocol"),
    ):
        content = message.to_record()
        content.config_records["message"].update(change)
        with pytest.raises(MessageError, match=f"{kind.__name__}: {words}"):
            kind.from_record(content)
    content = message.to_record()
    key = next(k for k in content.config_records["message"] if k not in ("protocol", "reason"))
    del content.config_records["message"][key]
    with pytest.raises(MessageError, match=key):
        kind.from_record(content)
    with pytest.raises(MessageError, match="no record 'message'"):
        kind.from_record(RecordDict({"other": ConfigRecord({})}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("site", "../../etc"), ("site", ""), ("site", "a\nb"), ("status", "fine"), ("round", 0)],
)
def test_odd_values_are_refused(name: str, value: object) -> None:
    content = MESSAGES[-1].to_record()
    content.config_records["message"][name] = value  # type: ignore[assignment]
    with pytest.raises(MessageError, match=name):
        RoundReply.from_record(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", float("nan")), ("loss", float("inf")), ("dice", [1.5]), ("training-cases", -1)],
)
def test_odd_numbers_are_refused(name: str, value: Any) -> None:
    content = MESSAGES[-1].to_record()
    content.metric_records["metrics"][name] = value
    with pytest.raises(MessageError, match=name):
        RoundReply.from_record(content)


def test_no_server_asks_for_more_steps_than_settings_allow() -> None:
    """An epoch has 1 / person-rate steps."""
    asked = MESSAGES[4].model_copy(update={"noise": 2.0, "clip": 0.1, "person_rate": 0.001})
    assert RoundRequest.from_record(asked.to_record()) == asked
    assert RunSettings(privacy="person", person_rate=0.001).mechanism == asked.mechanism
    content = asked.to_record()
    content.config_records["message"]["person-rate"] = 1e-7
    with pytest.raises(MessageError, match=r"person-rate: .* greater than or equal to 0\.001"):
        RoundRequest.from_record(content)


def test_numbers_are_not_taken_from_the_wrong_record() -> None:
    content = MESSAGES[-1].to_record()
    content.config_records["message"]["loss"] = 0.5
    with pytest.raises(MessageError, match="expected the numbers"):
        RoundReply.from_record(content)
    content = MESSAGES[-1].to_record()
    content["metrics"] = MetricRecord({"round": 1})
    with pytest.raises(MessageError, match="expected the numbers"):
        RoundReply.from_record(content)


def test_a_state_survives_the_trip(
    small_plan: AdaptationPlan, make_state: Callable[..., State]
) -> None:
    state = make_state(0)
    content = MESSAGES[-1].to_record(state)
    back = take_state(content, small_plan)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)
    size = sum(value.nbytes for value in state.values())
    assert size < record_bytes(content) < size + 200 * (len(state) + 5)


def test_a_state_may_travel_in_half_the_bytes(
    small_plan: AdaptationPlan, make_state: Callable[..., State]
) -> None:
    state = make_state(0)
    whole, half = (
        RecordDict({"arrays": state_record(small_plan, state, wire)})
        for wire in ("float32", "float16")
    )
    values = sum(value.size for value in state.values())
    assert record_bytes(whole) - record_bytes(half) == 2 * values
    back = take_state(half, small_plan, "float16")
    assert {value.dtype for value in back.values()} == {np.dtype("float32")}
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_allclose(back[key], value, rtol=2**-11, atol=2**-25)
        np.testing.assert_array_equal(back[key], rounded(small_plan, state, "float16")[key])


@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_what_was_rounded_arrives_as_it_is(
    small_plan: AdaptationPlan, make_state: Callable[..., State], wire: WireType
) -> None:
    state = rounded(small_plan, make_state(0), wire)
    content = RecordDict({"arrays": state_record(small_plan, state, wire)})
    for key, value in take_state(content, small_plan, wire).items():
        np.testing.assert_array_equal(value, state[key])
    for key, value in rounded(small_plan, state, wire).items():
        np.testing.assert_array_equal(value, state[key])


def test_stored_statistics_travel_exactly_and_a_dead_channel_survives(
    statistics_plan: AdaptationPlan, make_statistics_state: Callable[..., State]
) -> None:
    stored = np.array([1.0003, 0.9, 5e4, 3e-6, 1.7], np.float32)
    dead = np.full(5, 1e-9, np.float32)  # what the sites found, far below what is stored
    state = make_statistics_state(0) | {"0009/delta": dead - stored}
    assert (stored + (dead - stored).astype(np.float16).astype(np.float32)).min() < 0
    exact = statistics_plan.state_shapes(trained=False)
    content = RecordDict({"arrays": state_record(statistics_plan, state, "float16")})
    for there in (
        rounded(statistics_plan, state, "float16"),
        take_state(content, statistics_plan, "float16"),
    ):
        for key in exact:
            assert there[key].tobytes() == state[key].tobytes()
        assert (stored + there["0009/delta"]).min() >= 0
    whole = RecordDict({"arrays": state_record(statistics_plan, state, "float32")})
    trained = sum(state[key].size for key in state.keys() - exact.keys())
    assert record_bytes(whole) - record_bytes(content) == 2 * trained


@pytest.mark.parametrize(("sent", "agreed"), [("float32", "float16"), ("float16", "float32")])
def test_another_type_than_agreed_is_refused(
    small_plan: AdaptationPlan, make_state: Callable[..., State], sent: Any, agreed: Any
) -> None:
    content = RecordDict({"arrays": state_record(small_plan, make_state(0), sent)})
    with pytest.raises(StateError, match=rf"expected .* {agreed}, got .* {sent}"):
        take_state(content, small_plan, agreed)


@pytest.mark.parametrize("value", [7e4, -65520, np.inf, np.nan])
def test_a_value_that_float16_cannot_hold_is_one_error_at_the_sender(
    small_plan: AdaptationPlan, make_state: Callable[..., State], value: float
) -> None:
    state = make_state(0)
    state["0006/delta"][0, 0, 1, 2] = value
    for send in (state_record, rounded):
        with pytest.raises(StateError, match="'0006/delta': expected values within 65504"):
            send(small_plan, state, "float16")
    state["0006/delta"][0, 0, 1, 2] = 65504
    assert rounded(small_plan, state, "float16")["0006/delta"][0, 0, 1, 2] == 65504


def test_bytes_survive_the_trip_and_are_bounded() -> None:
    data = bytes(range(256)) * 10
    content = RecordDict({"arrays": array_record({"base": np.frombuffer(data, np.uint8)})})
    assert take_bytes(content, "base", limit=2560) == data
    with pytest.raises(MessageError, match="expected at most 100 bytes"):
        take_bytes(content, "base", limit=100)
    with pytest.raises(MessageError, match="'other' is missing"):
        take_bytes(content, "other", limit=2560)
