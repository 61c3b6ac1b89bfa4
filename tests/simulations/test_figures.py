"""Figures are drawn without a warning, also of a run whose files do not fit together."""

import warnings

import pytest

from dafne_federated.core.run_folder import RoundLine, SiteRound
from dafne_federated.simulations.figures import dice_by_round


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("chosen", [None, 0, 1, 2, 9])
def test_a_curve_needs_no_warning_wherever_the_release_is(rounds: int, chosen: int | None) -> None:
    lines = [
        RoundLine(
            round=number,
            trained=True,
            sites={"a": SiteRound(status="ok", dice={"muscle": 0.5})},
            aggregation_error=None,
            state_digest="",
            seconds=1.0,
        )
        for number in range(1, rounds + 1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dice_by_round(lines, "a", ["muscle"], chosen) is not None
