"""The settings file of simulate takes the name of every flag, and flags win over it."""

import inspect
from pathlib import Path

import pytest

from dafne_federated.cli.simulate import simulate
from dafne_federated.cli.simulation_options import SimulationOptions, read_options
from dafne_federated.core.errors import SettingsError
from dafne_federated.core.settings import RunSettings


def test_the_table_and_the_flags_have_the_same_names() -> None:
    flags = set(inspect.signature(simulate).parameters) - {"settings"}
    assert flags == SimulationOptions.model_fields.keys() | RunSettings.model_fields.keys()


def test_a_file_takes_all_names_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        'data = "images"\nbase-site = "A"\nshares = [3, 1, 1]\nsizes = "1,2"\nsites = 2\n'
        'engine = "ray"\nlocal-only = false\nrounds = 9\nmax-rank = 8\ndeadline = 12.5\n'
    )
    options, settings, given = read_options(path, {"rounds": 4, "base-site": "B"})
    assert (options.data, options.base_site) == (Path("images"), "B")
    assert (options.shares, options.sizes) == ((3.0, 1.0, 1.0), (1.0, 2.0))
    assert (options.engine, options.local_only, options.parallel) == ("ray", False, 1)
    assert (settings.rounds, settings.max_rank, settings.deadline) == (4, 8, 12.5)
    assert {"rounds", "base-site", "max-rank", "local-only"} <= given
    assert "parallel" not in given


def test_labels_that_sites_shall_lack_are_a_text_or_a_table(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('[without]\nsite-2 = ["disc"]\n')
    assert read_options(path, {})[0].without == {"site-2": ("disc",)}
    flags = {"without": "site-2: disc, canal; site-3:disc"}
    wanted = {"site-2": ("disc", "canal"), "site-3": ("disc",)}
    assert read_options(None, flags)[0].without == wanted
    assert read_options(None, {})[0].without == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("round = 3", "expected names of flags of simulate, .* got 'round'"),
        ('settings = "other.toml"', "got 'settings'"),
        ("shares = [1, 2]", r"shares: .* got \[1, 2\]"),
        ('without = "site-2"', "without: expected labels by site .* got 'site-2'"),
        ('without = "a:x;a:y"', "without: expected labels by site"),
        ('sizes = "a,b"', "sizes: expected numbers with commas between them, got 'a,b'"),
        ("phantom-persons = [0, 2]", r"phantom-persons: .* got \[0, 2\]"),
        ('engine = "warp"', "engine: .*'inline' or 'ray', got 'warp'"),
        ("parallel = 0", "parallel: .* got 0"),
        ("rank = 0", "rank: .* got 0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_options(path, {})
