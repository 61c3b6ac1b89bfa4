"""Good counts and moments can be pooled; each kind of bad one is refused in words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, RecordDict

from dafne_federated.core.class_weights import ClassCounts
from dafne_federated.core.moments import Moments
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.wire import StatisticsReply, StatisticsRequest
from dafne_federated.strategies.statistics_gate import (
    Answer,
    capped_counts,
    capped_moments,
    far_counts,
    far_moments,
    judge_statistics,
    other_grids,
)

PIXELS = [4 * 100 - 60, 40, 20]  # four slices of 100 pixels
HOLDING = [4, 3, 1]
Judge = Callable[..., Answer]


@pytest.fixture
def judged(statistics_plan: AdaptationPlan) -> Judge:
    def run(what: str, arrays: dict[str, Any] | None = None, **changes: Any) -> Answer:
        common: dict[str, Any] = {
            "run": "0" * 32,
            "base_digest": statistics_plan.base_digest,
            "plan_digest": statistics_plan.digest,
            "what": what,
            "number": 1 if what == "moments" else 0,
        }
        counts = {"class_pixels": PIXELS, "class_slices": HOLDING} if what == "classes" else {}
        fields = common | {"site": "site-a", "status": "ok", "slices": 4} | counts | changes
        given = {"mean": np.arange(3.0), "variance": np.arange(3.0)} | (arrays or {})
        content = StatisticsReply.model_validate(fields).to_record()
        if what == "moments":
            content = StatisticsReply.model_validate(fields).to_record(
                {k: v for k, v in given.items() if isinstance(v, np.ndarray)}
            )
            for name, array in given.items():
                if isinstance(array, Array):
                    content.array_records["arrays"][name] = array
        request = StatisticsRequest.model_validate(common)
        return judge_statistics("site-a", content, request, statistics_plan, max_cases=2)

    return run


def test_good_answers_can_be_pooled(judged: Judge) -> None:
    answer = judged("classes")
    assert (answer.status, answer.slices) == ("shared", 4)
    assert answer.classes == ClassCounts(tuple(PIXELS), tuple(HOLDING))
    answer = judged("moments")
    assert answer.moments is not None
    assert (answer.status, answer.moments.count) == ("shared", 4)
    np.testing.assert_array_equal(answer.moments.variance, [0, 1, 2])


def test_a_site_may_keep_its_numbers_to_itself(judged: Judge) -> None:
    answer = judged("classes", status="withheld", reason="this site does not share statistics")
    assert (answer.status, answer.classes) == ("withheld", None)
    assert answer.reason == "this site does not share statistics"


@pytest.mark.parametrize(
    ("what", "changes", "words"),
    [
        ("moments", {"site": "site-b"}, "site: expected 'site-a', got 'site-b'"),
        ("moments", {"run": "1" * 32}, "run: expected"),
        ("moments", {"plan_digest": "c" * 64}, "plan digest: expected"),
        ("moments", {"number": 0}, "question: expected 'moments 1', got 'moments 0'"),
        ("moments", {"slices": 0}, "training slices: expected 1 to 4000, got 0"),
        ("classes", {"slices": 4001}, "training slices: expected 1 to 4000, got 4001"),
        ("classes", {"class_pixels": PIXELS[:2]}, "expected pixels and slices of 3 channels"),
        ("classes", {"class_pixels": [341, 40, 20]}, "expected slices of one size"),
        ("classes", {"class_pixels": [0, 0, 0]}, "expected slices of one size"),
        ("classes", {"class_slices": [5, 3, 1]}, "channel 0 cannot have 340 pixels in 5 slices"),
        ("classes", {"class_slices": [4, 0, 1]}, "channel 1 cannot have 40 pixels in 0 slices"),
        ("classes", {"class_pixels": [400, 0, 0]}, "channel 1 cannot have 0 pixels in 3 slices"),
        ("classes", {"class_pixels": [199, 1, 200]}, "channel 1 cannot have 1 pixels in 3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    judged: Judge, what: str, changes: dict[str, Any], words: str
) -> None:
    answer = judged(what, **changes)
    assert (answer.status, answer.moments, answer.classes) == ("refused", None, None)
    assert words in answer.reason


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"variance": np.array([1.0, -1e-9, 1.0])}, "variance: expected values of at least 0"),
        ({"mean": np.array([1.0, np.nan, 1.0])}, "'mean': expected finite values, got 1"),
        ({"variance": np.array([1.0, np.inf, 1.0])}, "'variance': expected finite values"),
        ({"mean": np.zeros(4)}, "'mean': expected (3,) float64"),
        ({"mean": np.zeros(3, np.float32)}, "'mean': expected (3,) float64, got (3,) float32"),
        ({"mean": np.full(3, 1e19)}, "that float32 can hold"),
        ({"variance": np.full(3, 1e37)}, "that float32 can hold"),
        ({"more": np.zeros(3)}, "unknown ['more']"),
        ({"mean": None}, "missing ['mean']"),
        (
            {"mean": Array("float64", (3,), "numpy.ndarray", b"x" * 152)},
            "'mean': its bytes are damaged",
        ),
    ],
)
def test_moments_that_are_none_are_refused(
    judged: Judge, arrays: dict[str, Any], words: str
) -> None:
    answer = judged("moments", arrays)
    assert (answer.status, answer.moments) == ("refused", None)
    assert words in answer.reason


def test_an_empty_answer_is_refused(statistics_plan: AdaptationPlan) -> None:
    request = StatisticsRequest(
        run="0" * 32,
        base_digest=statistics_plan.base_digest,
        plan_digest=statistics_plan.digest,
        what="classes",
        number=0,
    )
    answer = judge_statistics("site-a", RecordDict({}), request, statistics_plan, 1)
    assert (answer.status, "no record 'message'" in answer.reason) == ("refused", True)


def test_slices_of_another_size_than_most_are_named(judged: Judge) -> None:
    usual = judged("classes")
    other = judged("classes", class_pixels=[740, 40, 20])
    assert other.status == "shared"
    found = other_grids({"a": other, "b": usual, "c": usual, "d": Answer("failed")})
    assert found == {"a": "pixels of a slice: expected 100 as at most sites, got 200"}
    assert other_grids({"d": Answer("failed")}) == {}


def sharing(*parts: tuple[float, float]) -> dict[str, Answer]:
    return {
        f"site {n}": Answer("shared", moments=Moments(4, np.array([m, 0.0]), np.array([v, 0.0])))
        for n, (m, v) in enumerate(parts)
    }


@pytest.mark.parametrize("bad", [(1e18, 1.0), (-1e3, 1.0), (0.0, 1e12)])
def test_moments_far_from_most_are_refused_in_words(bad: tuple[float, float]) -> None:
    honest = ((0.0, 1.0), (3.0, 2.0))
    reasons = far_moments(sharing(*honest, bad))
    assert list(reasons) == ["site 2"]
    assert "far from those of most sites: expected means and deviations within" in reasons["site 2"]
    assert far_moments(sharing(*honest, (-8.0, 5.0))) == {}
    assert far_moments(sharing(honest[0], bad)) == {}  # two have no majority


def test_no_site_counts_more_slices_than_all_others_together() -> None:
    parts = [Moments(count, np.zeros(1), np.zeros(1)) for count in (10**9, 3, 4)]
    assert [part.count for part in capped_moments(parts)] == [7, 3, 4]
    assert capped_moments(parts[:2]) == parts[:2]


def counting(*parts: tuple[int, tuple[int, ...], tuple[int, ...]]) -> dict[str, Answer]:
    return {
        f"site {n}": Answer("shared", slices=slices, classes=ClassCounts(pixels, holding))
        for n, (slices, pixels, holding) in enumerate(parts)
    }


def test_no_site_counts_more_slices_of_a_label_than_all_others_together() -> None:
    small = (4, (380, 20), (4, 3))
    answers = list(counting((8000, (700_000, 100_000), (8000, 6000)), small, small).values())
    great, *others = capped_counts(answers)
    assert others == [answer.classes for answer in answers[1:]]
    assert (great.slices, great.pixels) == ((8, 6), (700, 100))  # 8 slices, the same shares
    assert capped_counts(answers[:2]) == [answer.classes for answer in answers[:2]]
    rare = list(counting((100, (9990, 10), (100, 1)), small).values()) + answers[2:]
    assert capped_counts(rare)[0] == ClassCounts((799, 10), (8, 1))  # a slice is left whole


def test_counts_out_of_all_proportion_are_refused_by_channel() -> None:
    honest = ((4, (380, 20), (4, 3)), (6, (560, 40), (6, 5)), (3, (270, 30), (3, 3)))
    assert far_counts(counting(*honest)) == {}
    reasons = far_counts(counting(*honest, (4, (10, 390), (4, 4))))
    assert list(reasons) == ["site 3"]
    assert "channel 1 has 97.5 pixels in a slice that holds it, expected" in reasons["site 3"]
    # A label that a site lacks is nothing unusual, and two sites have no majority.
    assert far_counts(counting(*honest, (4, (400, 0), (4, 0)))) == {}
    assert far_counts(counting(honest[0], (4, (10, 390), (4, 4)))) == {}
    assert far_counts({"a": Answer("failed")}) == {}
