"""Thirteen kinds of bad update among good ones, and what becomes of each.

| bad update                  | stopped by                                                     |
|-----------------------------|----------------------------------------------------------------|
| NaN                         | the gate: values must be finite                                |
| infinity                    | the gate: values must be finite                                |
| wrong name of an array      | the gate: names are those of the plan                          |
| wrong shape                 | the gate: shapes are those of the plan                         |
| wrong dtype                 | the gate: float32 only                                         |
| rank above the bound        | the gate: the plan's max-rank, and the rank that was sent      |
| stale round                 | the gate: it answers another question                          |
| other plan                  | the gate: the digest is another one                            |
| a million cases claimed     | the gate: at most the cases that the site offered              |
| the same in the offer       | the cap: never more than all others together                   |
| 10^6 times the norm         | the gate: at most max-norm-ratio times the median of the round |
| more bytes than it claims   | the gate: counted before anything is parsed                    |
| turned sign                 | **not the gate, not strategy 'product'**                       |
|                             | robust 'krum', 'multi-krum': left out; 'geometric-median':     |
|                             | weighed down; 'clipped': not in the first round, weighed down  |
|                             | once its change of the round is large beside those of others   |

An update with its sign turned has the size and the form of a good one: only by comparing what
sites want can it be told from them. With strategy 'product' alone it pulls the mean back by
twice its weight; who fears that takes a robust rule, at the price of what it takes from honest
sites that differ.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, RecordDict

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, kernel_update
from dafne_federated.core.wire import RoundReply, RoundRequest
from dafne_federated.strategies import STRATEGIES
from dafne_federated.strategies.aggregation import Update, capped, in_order
from dafne_federated.strategies.outliers import too_large, update_norm
from dafne_federated.strategies.robust import ROBUST_RULES
from dafne_federated.strategies.update_gate import Verdict, judge

RUN, BAD = "0" * 32, "site-x"
Make = Callable[..., State]


def turned(state: State) -> State:
    """Return the update that undoes ``state``: the products and the arrays change their sign."""
    return {key: value if key.endswith("/a") else -value for key, value in state.items()}


def boosted(state: State) -> State:
    """Return an update 10^6 times as large, whose single values still look possible."""
    return {
        key: value * np.float32(1e3 if key[-2:] in ("/a", "/b") else 2e3)
        for key, value in state.items()
    }


def padded(array: np.ndarray, size: int) -> Array:
    whole = Array(array)
    return Array(whole.dtype, whole.shape, whole.stype, whole.data + b"\0" * size)


HEAD = np.zeros((1, 1, 4, 3), np.float32)
ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"0006/delta": HEAD + np.nan}, "expected finite values, got 12"),
    "infinity": ({"0006/delta": HEAD + np.inf}, "expected finite values, got 12"),
    "name": ({"0007/delta": HEAD}, r"unknown \['0007/delta'\]"),
    "shape": ({"0006/delta": HEAD[..., :2]}, r"expected \(1, 1, 4, 3\) float32, got \(1, 1, 4, 2"),
    "dtype": ({"0006/delta": HEAD.astype(np.float64)}, r"got \(1, 1, 4, 3\) float64"),
    "oversized": ({"0006/delta": padded(HEAD, 9999)}, "'0006/delta': expected .* in 10175 bytes"),
}
CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "stale round": ({"round": 2}, "round: expected '3', got '2'"),
    "other plan": ({"plan_digest": "c" * 64}, "plan digest: expected"),
    "a million cases": (
        {"training_cases": 1_000_000},
        "training cases: expected 1 to 4, got 1000000",
    ),
}


class Federation:
    """Six honest sites that differ a little, and one that may send anything."""

    def __init__(self, plan: AdaptationPlan, make_state: Make) -> None:
        self.plan, self._make = plan, make_state
        self.request = RoundRequest(
            run=RUN,
            round=3,
            base_digest=plan.base_digest,
            plan_digest=plan.digest,
            epochs=1,
            batch_size=4,
            learning_rate=0.01,
            seed=1,
        )
        self.honest = {f"site-{n}": self.judged(f"site-{n}", self.state(n)) for n in range(6)}

    def state(self, number: int) -> State:
        middle, noise = self._make(0), self._make(50 + number)
        return {key: value + np.float32(0.1) * noise[key] for key, value in middle.items()}

    def judged(
        self,
        site: str,
        state: State,
        arrays: dict[str, Any] | None = None,
        offered: int = 4,
        **claims: Any,
    ) -> Verdict:
        reply = RoundReply(
            run=RUN,
            round=3,
            site=site,
            base_digest=self.plan.base_digest,
            plan_digest=self.plan.digest,
            status="ok",
            training_cases=4,
        ).model_copy(update=claims)
        content: RecordDict = reply.to_record(state)
        for name, value in (arrays or {}).items():
            content.array_records["arrays"][name] = (
                value if isinstance(value, Array) else Array(value)
            )
        return judge(site, content, self.request, self.plan, offered, sent=self.state(9))

    def result(self, bad: Verdict | None, robust: str = "none") -> State:
        """Return what a round makes of the honest sites and the bad one."""
        verdicts = self.honest | ({BAD: bad} if bad else {})
        updates = [v.update for v in verdicts.values() if v.update]
        norms = {u.site: update_norm(self.plan, u.state) for u in updates}
        refused = too_large(norms, ratio=20)
        updates = [u for u in updates if u.site not in refused]
        return STRATEGIES["product"](self.plan, self.chosen(updates, robust)).state

    def chosen(self, updates: list[Update], robust: str) -> list[Update]:
        return ROBUST_RULES[robust](self.plan, updates, 1, self.state(9))

    def moved(self, bad: Verdict, robust: str = "none") -> float:
        """Return how far the bad site moves the result, as a share of the result's size."""
        vectors = []
        for verdict in (None, bad):
            state = self.result(verdict, robust)
            parts = [
                self.plan.scale * kernel_update(t, state[f"{t.key}/a"], state[f"{t.key}/b"])
                if t.low_rank
                else state[f"{t.key}/delta"]
                for t in self.plan.targets
            ]
            vectors.append(np.concatenate([part.ravel() for part in parts]))
        alone, together = vectors
        return float(np.linalg.norm(alone - together) / np.linalg.norm(alone))


@pytest.fixture(scope="module")
def federation(small_plan: AdaptationPlan, make_state: Make) -> Federation:
    return Federation(small_plan, make_state)


def refused_without_a_trace(federation: Federation, bad: Verdict, words: str) -> None:
    import re

    assert (bad.status, bad.update) == ("refused", None)
    assert re.search(words, bad.reason), bad.reason
    assert federation.moved(bad) == 0


def test_honest_updates_pass(federation: Federation) -> None:
    assert all(verdict.status == "ok" for verdict in federation.honest.values())
    assert federation.moved(federation.judged(BAD, federation.state(6))) < 0.05


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_are_not_of_the_plan_are_refused(federation: Federation, kind: str) -> None:
    arrays, words = ARRAYS[kind]
    bad = federation.judged(BAD, federation.state(6), arrays)
    refused_without_a_trace(federation, bad, words)


@pytest.mark.parametrize("kind", CLAIMS)
def test_claims_that_do_not_fit_are_refused(federation: Federation, kind: str) -> None:
    claims, words = CLAIMS[kind]
    bad = federation.judged(BAD, federation.state(6), **claims)
    refused_without_a_trace(federation, bad, words)


@pytest.mark.parametrize(
    ("rank", "words"), [(7, "expected 1 to 6, got 7"), (5, "2 as it was sent")]
)
def test_a_rank_that_nobody_asked_for_is_refused(
    federation: Federation, make_state: Make, rank: int, words: str
) -> None:
    refused_without_a_trace(federation, federation.judged(BAD, make_state(0, rank)), words)


def test_an_update_of_a_million_times_the_norm_is_refused(federation: Federation) -> None:
    state = boosted(federation.state(6))
    bad = federation.judged(BAD, state)
    assert bad.status == "ok"  # each value could be one
    size = update_norm(federation.plan, federation.state(6))
    assert update_norm(federation.plan, state) > 0.9e6 * size
    assert federation.moved(bad) == 0


def test_a_turned_sign_passes_the_gate_and_product_alone_does_not_stop_it(
    federation: Federation,
) -> None:
    bad = federation.judged(BAD, turned(federation.state(6)))
    assert bad.status == "ok"
    # One of seven, with the opposite sign: the mean falls from 1 to 5/7.
    assert federation.moved(bad) == pytest.approx(2 / 7, abs=0.03)


def test_clipping_stops_a_turned_sign_once_states_are_larger_than_changes(
    federation: Federation,
) -> None:
    bad = federation.judged(BAD, turned(federation.state(6)))
    assert federation.moved(bad, "clipped") < 0.05
    first = {key: np.zeros_like(value) for key, value in federation.state(9).items()}
    updates = [v.update for v in (*federation.honest.values(), bad) if v.update]
    chosen = {u.site: u for u in ROBUST_RULES["clipped"](federation.plan, updates, 1, first)}
    assert chosen[BAD].share > 0.9


@pytest.mark.parametrize(("robust", "most"), [("multi-krum", 0.0), ("geometric-median", 0.04)])
def test_robust_rules_stop_a_turned_sign(federation: Federation, robust: str, most: float) -> None:
    bad = federation.judged(BAD, turned(federation.state(6)))
    updates = [v.update for v in (*federation.honest.values(), bad) if v.update]
    chosen = {u.site: u.share for u in federation.chosen(updates, robust)}
    assert chosen.get(BAD, 0.0) < 0.2
    good_only = federation.result(None)
    with_bad = federation.result(bad, robust)
    size = np.linalg.norm(good_only["0006/delta"])
    assert np.linalg.norm(good_only["0006/delta"] - with_bad["0006/delta"]) <= most * size


def test_a_million_cases_claimed_already_in_the_offer_are_capped(federation: Federation) -> None:
    many = {"offered": 1_000_000, "training_cases": 1_000_000}
    bad = federation.judged(BAD, turned(federation.state(6)), **many)
    assert bad.status == "ok"
    updates = [v.update for v in (*federation.honest.values(), bad) if v.update]
    for rule, weight in (("none", 0.5), ("clipped", 0.05)):
        chosen = federation.chosen(updates, rule)
        weights = dict(zip((u.site for u in in_order(chosen)[0]), in_order(chosen)[1], strict=True))
        assert weights[BAD] == pytest.approx(weight, abs=0.01)
    few = federation.judged(BAD, turned(federation.state(6)))
    assert federation.moved(bad, "geometric-median") == pytest.approx(
        federation.moved(few, "geometric-median"), abs=1e-5
    )


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_sites_are_not_capped(federation: Federation, count: int) -> None:
    updates = [Update(f"site {n}", federation.state(n), 10**n) for n in range(count)]
    assert capped(updates) == updates


def test_the_cap_does_not_depend_on_the_order_and_spares_half(federation: Federation) -> None:
    updates = [Update(f"site {n}", {}, cases) for n, cases in enumerate((7, 1, 2, 3))]
    shares = [{u.site: u.share for u in capped(given)} for given in (updates, updates[::-1])]
    assert shares[0] == shares[1]
    assert shares[0] == {"site 0": pytest.approx(6 / 7), "site 1": 1, "site 2": 1, "site 3": 1}
    half = [Update(f"site {n}", {}, cases) for n, cases in enumerate((6, 1, 2, 3))]
    assert capped(half) == half


def test_krum_takes_an_honest_update_whatever_one_site_sends(federation: Federation) -> None:
    for spoil in (turned, boosted):
        bad = federation.judged(BAD, spoil(federation.state(6)))
        updates = [v.update for v in (*federation.honest.values(), bad) if v.update]
        (one,) = federation.chosen(updates, "krum")
        assert one.site in federation.honest
