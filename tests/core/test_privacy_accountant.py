"""Epsilon is what a formula on paper gives, and never less when more was spent."""

import math
import sys

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.privacy_accountant import Mechanism, Spent, epsilon_of


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Return epsilon of one Gaussian release of sensitivity 1, exactly.

    Source:
        Theorem 8 of https://arxiv.org/abs/1805.06530.
    """

    def excess(epsilon: float) -> float:
        left = norm.cdf(0.5 / noise - epsilon * noise)
        right = math.exp(epsilon) * norm.cdf(-0.5 / noise - epsilon * noise)
        return float(left - right - delta)

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 1), (5.0, 40), (2.0, 20)])
def test_without_drawing_it_is_the_closed_form_of_composed_gaussians(
    noise: float, steps: int
) -> None:
    pytest.importorskip("dp_accounting")
    exact = gaussian_epsilon(noise / math.sqrt(steps), 1e-5)
    found = epsilon_of([Spent(noise, 1.0, steps)], 1e-5)
    assert exact <= found + 1e-9  # an upper bound
    assert found == pytest.approx(exact, rel=2e-3)


def test_one_drawn_step_is_bounded_by_amplification_on_paper() -> None:
    """It is ln(1 + q (e^epsilon - 1)) at q delta.

    Source:
        Theorem 8 of https://arxiv.org/abs/1807.01647.
    """
    pytest.importorskip("dp_accounting")
    rate = 0.1
    bound = math.log1p(rate * math.expm1(gaussian_epsilon(1.0, 1e-5 / rate)))
    found = epsilon_of([Spent(1.0, rate, 1)], 1e-5)
    assert found == pytest.approx(bound, rel=2e-3)


def test_several_runs_cost_more_than_one_and_what_is_equal_adds_up() -> None:
    pytest.importorskip("dp_accounting")
    one = [Spent(2.0, 0.5, 8)]
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of(one * 3, 1e-5) == epsilon_of([Spent(2.0, 0.5, 24)], 1e-5)
    assert epsilon_of(one, 1e-5) < epsilon_of([*one, Spent(8.0, 0.1, 5)], 1e-5)


def test_steps_give_each_person_the_epochs_on_average() -> None:
    assert [Mechanism(1, 1, rate).steps(4) for rate in (1.0, 0.5, 0.25, 0.3)] == [4, 8, 16, 13]
    assert Mechanism(1, 1, 1.0).steps(0) == 1


def test_without_the_accountant_there_is_a_plain_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(SettingsError, match=r"install it with: pip install .*privacy"):
        epsilon_of([Spent(1.0, 1.0, 1)], 1e-5)
