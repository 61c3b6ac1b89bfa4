"""Noise that would not hide what it says is refused, and the way out is one."""

from typing import Any

import pytest

from dafne_federated.core import strategy_table
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.settings import RunSettings, read_settings
from dafne_federated.core.strategy_table import ROBUST_TABLE, STRATEGY_TABLE

HIDDEN: dict[str, Any] = {"privacy": "site", "strategy": "frozen-a", "min-sites": 5}


@pytest.mark.parametrize(
    ("given", "words", "way"),
    [
        ({"statistics": "pooled"}, "what sites pool", {"statistics": "base"}),
        ({"class-weights": "pooled"}, "take statistics 'base'", {"class-weights": "case"}),
        ({"sites-per-round": 5}, "take sites-per-round 0", {"sites-per-round": 0}),
        ({"late": "use"}, "take late 'drop'", {"late": "drop"}),
        ({"person-rate": 0.1}, "person-rate is for privacy 'person', and", {"person-rate": 0.5}),
        *(
            ({"robust": name}, "take robust 'none'", {"robust": "none"})
            for name in ROBUST_TABLE
            if name != "none"
        ),
    ],
)
def test_what_a_site_is_not_hidden_in_is_refused(
    given: dict[str, Any], words: str, way: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=words):
        read_settings(None, **(HIDDEN | given))
    assert read_settings(None, **(HIDDEN | given | way)).privacy == "site"


@pytest.mark.parametrize("strategy", STRATEGY_TABLE)
def test_sites_are_hidden_where_the_printed_table_allows_a_server_optimiser(strategy: str) -> None:
    lines = [line for line in (strategy_table.__doc__ or "").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = cells[0].index("server optimiser")
    printed = {row[0]: row[column] == "yes" for row in cells[1:]}
    method = "bias" if STRATEGY_TABLE[strategy].pairs == "never" else "lora"
    given: dict[str, Any] = HIDDEN | {"strategy": strategy, "method": method}
    if printed[strategy]:
        assert read_settings(None, **given).strategy == strategy
        return
    with pytest.raises(SettingsError, match=r"plain sums of arrays.*take strategy 'frozen-a'"):
        read_settings(None, **given)


def test_hidden_sites_train_and_step_as_they_like() -> None:
    free = {"optimiser": "kept", "proximal": 0.1, "server-optimiser": "adam"}
    settings = read_settings(None, **(HIDDEN | free))
    assert settings.mechanism is None  # nothing is asked of the sites
    assert settings.norm_ratio_used == float("inf")
    assert RunSettings().norm_ratio_used == RunSettings().max_norm_ratio
