"""A good reply becomes an update; each kind of bad one is refused in words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State
from dafne_federated.core.wire import RoundReply, RoundRequest
from dafne_federated.core.wire_arrays import rounded, state_record
from dafne_federated.strategies.update_gate import Verdict, judge

RUN = "0" * 32


@pytest.fixture
def request_(small_plan: AdaptationPlan) -> RoundRequest:
    return RoundRequest(
        run=RUN,
        round=3,
        base_digest=small_plan.base_digest,
        plan_digest=small_plan.digest,
        epochs=1,
        batch_size=4,
        learning_rate=0.01,
        seed=1,
    )


@pytest.fixture
def reply(request_: RoundRequest) -> RoundReply:
    return RoundReply(
        run=RUN,
        round=3,
        site="site-a",
        base_digest=request_.base_digest,
        plan_digest=request_.plan_digest,
        status="ok",
        training_cases=5,
        training_slices=20,
        dice=[0.5, 0.25],
        dice_cases=[2, 2],
    )


Judge = Callable[..., Verdict]


@pytest.fixture
def judged(
    small_plan: AdaptationPlan,
    request_: RoundRequest,
    reply: RoundReply,
    make_state: Callable[..., State],
) -> Judge:
    def run(arrays: dict[str, Any] | None = None, **changes: Any) -> Verdict:
        content = reply.model_copy(update=changes).to_record(make_state(0))
        for name, value in (arrays or {}).items():
            if value is None:
                del content.array_records["arrays"][name]
            else:
                array = value if isinstance(value, Array) else Array(value)
                content.array_records["arrays"][name] = array
        return judge("site-a", content, request_, small_plan, max_cases=1000)

    return run


def test_a_good_reply_becomes_an_update(judged: Judge, make_state: Callable[..., State]) -> None:
    verdict = judged()
    assert (verdict.status, verdict.reason) == ("ok", "")
    assert verdict.update is not None
    assert (verdict.update.site, verdict.update.cases) == ("site-a", 5)
    for key, value in make_state(0).items():
        np.testing.assert_array_equal(verdict.update.state[key], value)


@pytest.mark.parametrize("first", [False, True])
def test_a_site_compares_with_as_many_states_as_it_was_sent_or_says_nothing(
    request_: RoundRequest, reply: RoundReply, small_plan: AdaptationPlan, first: bool
) -> None:
    """So a release that sites did not compare with the base, too, is not taken for one that is."""
    asked = request_.model_copy(update={"first": first, "epochs": 0})
    each = 2 * len(small_plan.labels)
    for states in (0, 1, 2):
        size = states * each
        change = {"change_persons": [1] * size, "change_total": [0.1] * size}
        said = reply.model_copy(update=change | {"change_squares": [0.01] * size})
        verdict = judge("site-a", said.to_record(), asked, small_plan, max_cases=1000)
        if states in (0, asked.states):
            assert (verdict.status, verdict.reason) == ("ok", "")
        else:
            words = f"change: expected {asked.states * each} counts and sums, got {size}"
            assert (verdict.status, verdict.reason) == ("refused", words)


def claims(shape: tuple[int, ...], size: int) -> Array:
    """An array whose header says one thing and whose bytes are something else."""
    return Array("float32", shape, "numpy.ndarray", b"\x93NUMPY" + b"\0" * size)


def inner(header: bytes) -> Array:
    """The right claim around bytes whose own header says ``header``."""
    import struct

    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    return Array("float32", (2, 7), "numpy.ndarray", start + b"\0" * 56)


def zipped() -> Array:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(1, "f4"))
    return Array("float32", (2, 7), "numpy.ndarray", buffer.getvalue())


def pickled() -> Array:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.array([object()], dtype=object), allow_pickle=True)
    return Array("float32", (6, 2), "numpy.ndarray", buffer.getvalue())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"0006/delta": np.full((1, 1, 4, 3), np.nan, "float32")}, "'0006/delta': .* got 12"),
        ({"0006/delta": np.full((1, 1, 4, 3), np.inf, "float32")}, "'0006/delta': .* finite"),
        ({"0006/delta": np.zeros((1, 1, 4, 4), "float32")}, "'0006/delta': expected .* got"),
        ({"0006/delta": np.zeros((1, 1, 4, 3), "float64")}, "got .* float64"),
        ({"0006/delta": np.zeros((1, 1, 4, 3), "int32")}, "got .* int32"),
        ({"0006/delta": None}, r"missing \['0006/delta'\]"),
        ({"0009/delta": np.zeros(1, "float32")}, r"unknown \['0009/delta'\]"),
        ({"0004/a": np.zeros((6, 3), "float32")}, r"expected one rank in all layers, got \[2, 3\]"),
        ({"0004/b": claims((2, 7), 50_000)}, "'0004/b': expected .* in 50006 bytes"),
        ({"0004/b": claims((2, 7), 10)}, "'0004/b': expected .* in 16 bytes"),
        ({"0004/b": claims((2, 7), 90)}, "'0004/b': its bytes are damaged"),
        ({"0004/a": pickled()}, "'0004/a': its bytes do not hold"),
        ({"0004/b": zipped()}, "'0004/b': its bytes are damaged"),
        ({"0004/b": inner(b"(((((\n")}, "'0004/b': its bytes are damaged"),
        ({"0004/b": inner(b"{[]: 1}\n")}, "'0004/b': its bytes are damaged"),
        (
            {"0004/b": inner(b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999,)}\n")},
            "'0004/b': its bytes do not hold",
        ),
        ({"0006/delta": np.full((1, 1, 4, 3), 3e38, "float32")}, "expected values within 10000"),
    ],
)
def test_bad_arrays_are_refused_by_name(judged: Judge, arrays: dict[str, Any], words: str) -> None:
    verdict = judged(arrays)
    assert verdict.status == "refused"
    assert verdict.update is None
    import re

    assert re.search(words, verdict.reason), verdict.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"round": 2}, "round: expected '3', got '2'"),
        ({"run": "1" * 32}, "run: expected"),
        ({"site": "site-b"}, "site: expected 'site-a', got 'site-b'"),
        ({"base_digest": "c" * 64}, "base digest: expected"),
        ({"plan_digest": "c" * 64}, "plan digest: expected"),
        ({"training_cases": 1_000_000}, "training cases: expected 1 to 1000, got 1000000"),
        ({"training_cases": 0}, "training cases: expected 1 to 1000, got 0"),
        ({"training_cases": -4}, "training-cases"),
        ({"dice": [0.5]}, "dice: expected 2 labels, got 1"),
        ({"dice": [float("nan"), 0.5]}, "dice"),
        ({"loss": float("inf")}, "loss"),
        ({"protocol": 2}, "protocol"),
    ],
)
def test_bad_claims_are_refused_by_name(judged: Judge, changes: dict[str, Any], words: str) -> None:
    verdict = judged(**changes)
    assert verdict.status == "refused"
    assert words in verdict.reason


def test_a_rank_above_the_bound_is_refused(
    request_: RoundRequest,
    reply: RoundReply,
    small_plan: AdaptationPlan,
    make_state: Callable[..., State],
) -> None:
    content = reply.to_record(make_state(0, 7))
    verdict = judge("site-a", content, request_, small_plan, 1000)
    assert verdict.reason == "rank: expected 1 to 6, got 7"
    within = judge("site-a", reply.to_record(make_state(0, 6)), request_, small_plan, 1000)
    assert within.status == "ok"


def test_the_request_says_in_which_type_an_update_comes(
    request_: RoundRequest,
    reply: RoundReply,
    small_plan: AdaptationPlan,
    make_state: Callable[..., State],
) -> None:
    half = request_.model_copy(update={"wire": "float16"})
    content = reply.to_record(state_record(small_plan, make_state(0), "float16"))
    verdict = judge("site-a", content, half, small_plan, 1000)
    assert verdict.update is not None
    for key, value in rounded(small_plan, make_state(0), "float16").items():
        np.testing.assert_array_equal(verdict.update.state[key], value)
    assert "float32, got" in judge("site-a", content, request_, small_plan, 1000).reason
    whole = judge("site-a", reply.to_record(make_state(0)), half, small_plan, 1000)
    assert "float16, got" in whole.reason
    content.array_records["arrays"]["0006/delta"] = Array(np.full((1, 1, 4, 3), np.nan, "f2"))
    assert "finite" in judge("site-a", content, half, small_plan, 1000).reason


def test_a_sites_own_no_is_passed_on(judged: Judge) -> None:
    verdict = judged(status="refused", reason="not today")
    assert (verdict.status, verdict.reason, verdict.update) == ("refused", "not today", None)


def test_messages_without_their_records_are_refused(
    request_: RoundRequest, small_plan: AdaptationPlan, reply: RoundReply
) -> None:
    empty = judge("site-a", RecordDict({}), request_, small_plan, 1000)
    assert "no record 'message'" in empty.reason
    bare = judge("site-a", reply.to_record(), request_, small_plan, 1000)
    assert "the message has no arrays" in bare.reason
    other = reply.to_record(ArrayRecord({}))
    assert "missing" in judge("site-a", other, request_, small_plan, 1000).reason


@pytest.mark.parametrize("key", ["0008/delta", "0013/delta"])
def test_statistics_must_come_back_bit_for_bit(
    key: str,
    statistics_plan: AdaptationPlan,
    make_statistics_state: Callable[..., State],
    request_: RoundRequest,
    reply: RoundReply,
) -> None:
    digest = statistics_plan.digest
    asked = request_.model_copy(update={"plan_digest": digest})
    answer = reply.model_copy(update={"plan_digest": digest})
    sent = make_statistics_state(0) | {"0008/delta": np.full(5, 1e6, np.float32)}
    trained = make_statistics_state(1)
    fixed = {k: sent[k] for k in statistics_plan.state_shapes(trained=False)}

    def judged(arrays: State) -> Verdict:
        content = answer.to_record(arrays)
        return judge("site-a", content, asked, statistics_plan, max_cases=1000, sent=sent)

    good = judged(trained | fixed)
    assert (good.status, good.reason) == ("ok", "")
    moved = fixed[key].copy()
    moved[0] = np.nextafter(moved[0], np.float32(2e6))
    bad = judged(trained | fixed | {key: moved})
    assert (bad.status, bad.update) == ("refused", None)
    assert f"array {key!r}: expected the stored statistics as they were sent" in bad.reason
    assert judged(trained | fixed | {"0006/delta": np.full((1, 1, 4, 3), 2e4, np.float32)}).reason


@pytest.mark.parametrize("name", ["x\n\x1b[31mround finished\u2028", "y" * 1_000_000])
def test_names_that_a_site_chose_stay_short_and_printable_in_reasons(
    request_: RoundRequest,
    reply: RoundReply,
    small_plan: AdaptationPlan,
    make_state: Callable[..., State],
    name: str,
) -> None:
    field = reply.to_record(make_state(0))
    field.config_records["message"][name] = "1"
    array = reply.to_record(make_state(0) | {name: np.zeros(1, np.float32)})
    for content in (field, array):
        verdict = judge("site-a", content, request_, small_plan, 1000)
        assert verdict.status == "refused"
        assert name[0] in verdict.reason
        assert verdict.reason.isprintable()
        assert len(verdict.reason) <= 500
