"""Settings are checked once, and what is wrong is named with its value."""

from pathlib import Path

import pytest

from dafne_federated.core.errors import SettingsError
from dafne_federated.core.settings import RunSettings, read_settings


def test_defaults_are_valid_and_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('rounds = 7\nlearning-rate = 0.01\nstrategy = "factors"\n')
    assert read_settings(None) == RunSettings()
    found = read_settings(path, rounds=9, epochs=None)
    assert (found.rounds, found.learning_rate, found.strategy) == (9, 0.01, "factors")


def test_json_round_trip() -> None:
    settings = RunSettings(rounds=3, gate="none")
    assert RunSettings.model_validate_json(settings.model_dump_json(by_alias=True)) == settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("round = 3", "round: Extra inputs are not permitted, got 3"),
        ("rounds = 0", "rounds: .*greater than or equal to 1, got 0"),
        ('strategy = "best"', "strategy: expected one of fedavg, .*, got 'best'$"),
        ('robust = "best"', "robust: expected one of none, .*, got 'best'$"),
        ('strategy = "fedavg"', "averages whole arrays.*; take strategy 'product', or a method"),
        (
            'strategy = "stack"\nmethod = "head"',
            "is for low-rank pairs.*; take strategy 'fedavg', or method 'lora'",
        ),
        (
            'strategy = "product"\nserver-optimiser = "adam"',
            "plain sums of arrays, and those of strategy 'product' are not; take server-optimiser",
        ),
        (
            'robust = "krum"\nmin-sites = 4',
            "'krum' needs 5 updates to bear 1 bad ones, and rounds of 4 would count; raise",
        ),
        (
            'strategy = "shared-a"\nproximal = 0.1',
            "a part of it is each site's own; take proximal 0, or strategy 'product'",
        ),
        (
            'strategy = "global+local"\nrank = 4\nmax-rank = 5',
            "trains at rank 4 and local-rank 2 together; raise max-rank to 6",
        ),
        ('optimiser = "best"', "optimiser: Input should be 'fresh' or 'kept', got 'best'"),
        ("learning-rate = nan", "learning-rate: .* got nan"),
        ("rank = 9\nmax-rank = 4", "rank: expected at most max-rank 4, got 9"),
        ("rounds = [", "cannot read settings"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_settings(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: cannot read settings"):
        read_settings(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise": 1.0}, "noise is for privacy 'person' or 'site', and privacy is 'none'"),
        ({"person-rate": 0.1}, "person-rate is for privacy 'person'"),
        ({"privacy": "person", "statistics": "pooled"}, "take statistics 'base'"),
        ({"privacy": "person", "class-weights": "pooled"}, "class-weights 'case'"),
        ({"privacy": "person", "noise": 0.01}, "noise: "),
    ],
)
def test_privacy_that_would_not_hold_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_settings(None, **given)


def test_without_privacy_there_is_no_mechanism() -> None:
    assert RunSettings().mechanism is None
    mechanism = RunSettings(privacy="person", noise=3.0).mechanism
    assert mechanism is not None
    assert (mechanism.noise, mechanism.rate) == (3.0, RunSettings().person_rate)
