"""The server hides each site: the noise is as large, as secret and as repeatable as it says."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from scipy.stats import kstest, norm

pytest.importorskip("dp_accounting")

from dafne_federated.core.errors import RunError
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, moving_arrays
from dafne_federated.server.rounds import first_state, run_rounds
from dafne_federated.server.site_noise import (
    DELTA,
    KEY_BYTES,
    require_site_noise,
    site_epsilon,
    with_site_noise,
)
from dafne_federated.strategies.site_privacy import moved_norm
from tests.server.conftest import run_with_stops, stop_in

Make = Callable[..., Any]
HIDDEN = {"strategy": "frozen-a", "privacy": "site", "noise": 2.0, "clip": 0.4}
KEY = bytes(range(KEY_BYTES))


def noised(folder: RunFolder, plan: AdaptationPlan, number: int, mean: State, count: int) -> State:
    return with_site_noise(folder, folder.info().settings, plan, number, mean, mean, count)


def test_the_noise_is_gaussian_of_the_length_that_the_accountant_is_told(
    new_run: Make, statistics_plan: AdaptationPlan, make_statistics_state: Make
) -> None:
    folder = new_run(**HIDDEN)
    require_site_noise(folder, folder.info().settings)
    mean = make_statistics_state(1)
    moving = moving_arrays(statistics_plan, mean, ("a",))
    for count in (1, 4):
        found = []
        for number in range(200):
            noisy = noised(folder, statistics_plan, number, mean, count)
            found += [(noisy[name].astype("f8") - mean[name]).ravel() for name in moving]
            still = mean.keys() - set(moving)
            assert all(noisy[name].tobytes() == mean[name].tobytes() for name in still)
        values = np.concatenate(found) / (2.0 * 0.4 / count)
        assert values.size > 10_000
        assert values.std() == pytest.approx(1, abs=5 / math.sqrt(2 * values.size))
        assert kstest(values, "norm").pvalue > 1e-4


def test_noise_follows_from_key_round_state_and_mean_and_from_nothing_else(
    new_run: Make, small_plan: AdaptationPlan, make_state: Make
) -> None:
    folders = [new_run(**HIDDEN), new_run(**HIDDEN, seed=7), new_run(**HIDDEN)]
    folders[0].noise_key.write_bytes(KEY)
    folders[1].noise_key.write_bytes(KEY)
    folders[2].noise_key.write_bytes(KEY[::-1])
    sent, mean = make_state(0), make_state(1)
    nudged = mean | {"0006/delta": mean["0006/delta"] + np.float32(1e-6)}

    def noise(folder: RunFolder, number: int, sent: State, mean: State, count: int) -> bytes:
        np.random.seed(1)  # noqa: NPY002 - it must not matter
        settings = folder.info().settings
        noisy = with_site_noise(folder, settings, small_plan, number, sent, mean, count)
        value = (noisy["0004/b"].astype("f8") - mean["0004/b"]) * count
        return np.round(value, 4).tobytes()

    one = noise(folders[0], 1, sent, mean, 2)
    assert noise(folders[0], 1, sent, mean, 2) == one
    assert noise(folders[1], 1, sent, mean, 2) == one  # the seed that everybody knows
    others = [
        noise(folders[2], 1, sent, mean, 2),
        noise(folders[0], 2, sent, mean, 2),
        noise(folders[0], 1, mean, mean, 2),
        noise(folders[0], 1, sent, nudged, 2),
        noise(folders[0], 1, sent, mean, 3),
    ]
    assert len({one, *others}) == 6


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (3.0, 5), (10.0, 20)])
def test_epsilon_is_that_of_composed_gaussians(noise: float, rounds: int) -> None:
    """Rounds are one release of ``noise / sqrt(rounds)``.

    Source:
        Theorem 8 of https://arxiv.org/abs/1805.06530; above it the bound by Renyi divergence,
        https://arxiv.org/abs/1702.07476.
    """
    settings = RunSettings.model_validate(HIDDEN | {"noise": noise})
    found, deviation = site_epsilon(settings, rounds), noise / math.sqrt(rounds)

    def delta(epsilon: float) -> float:
        left = norm.cdf(0.5 / deviation - epsilon * deviation)
        return float(left - math.exp(epsilon) * norm.cdf(-0.5 / deviation - epsilon * deviation))

    assert delta(found) <= DELTA < delta(0.99 * found)
    assert found < 0.5 / deviation**2 + math.sqrt(2 * math.log(1 / DELTA)) / deviation


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "frozen-a"}, {"strategy": "alternating"}, {"server_optimiser": "momentum"}],
)
def test_a_run_stopped_anywhere_ends_in_the_same_bits(
    new_run: Make, make_grid: Make, settings: dict[str, Any]
) -> None:
    def run(stops: tuple[int, ...] = (), key: bytes | None = KEY) -> list[str]:
        folder = new_run(**(HIDDEN | settings))
        if key:
            folder.noise_key.write_bytes(key)
        run_with_stops(make_grid, folder, stops)
        return [line.state_digest for line in folder.rounds()]

    whole = run()
    assert run((1, 2, 3, 4)) == whole
    assert not set(run(key=None)) & set(whole)  # its own key, which nobody chose


def test_the_lines_of_rounds_say_what_was_spent_so_far(new_run: Make, make_grid: Make) -> None:
    folder = new_run(**HIDDEN)
    run_rounds(make_grid(folder), folder)
    lines, settings = folder.rounds(), folder.info().settings
    expected = [site_epsilon(settings, rounds) for rounds in (1, 2, 3, 3)]
    assert [line.epsilon for line in lines] == expected
    assert {(line.delta, line.unit) for line in lines} == {(DELTA, "site")}
    assert len(folder.noise_key.read_bytes()) == KEY_BYTES
    assert folder.noise_key.stat().st_mode & 0o777 == 0o600
    open_run = new_run(strategy="frozen-a")
    run_rounds(make_grid(open_run), open_run)
    assert {(line.epsilon, line.unit) for line in open_run.rounds()} == {(None, None)}
    assert not open_run.noise_key.exists()


def test_a_site_that_shouts_moves_the_state_no_more_and_shuts_nobody_out(
    new_run: Make, make_grid: Make
) -> None:
    folder = new_run(**HIDDEN, rounds=1)
    grid = make_grid(folder)

    def shout(_message: Message, content: RecordDict) -> RecordDict:
        for record in content.array_records.values():
            for name, array in record.items():
                if name.endswith(("/b", "/delta")):
                    record[name] = type(array)(array.numpy() * np.float32(1e3))
        return content

    list(grid.sites.values())[2].change = shout
    run_rounds(grid, folder)
    line, plan = folder.rounds()[0], folder.plan()
    assert {site.status for site in line.sites.values()} == {"ok"}
    shares = {name: site.share for name, site in line.sites.items()}
    assert shares["site-c"] < 0.01 < min(shares["site-a"], shares["site-b"])
    before, after = first_state(folder.info(), plan), folder.state_after(1)
    moving = moving_arrays(plan, before, ("a",))
    values = sum(before[name].size for name in moving)
    longest_noise = 2.0 * 0.4 / 3 * (math.sqrt(values) + 6)  # six sigma of a Gaussian's length
    assert moved_norm(after, before, moving) <= 0.4 + longest_noise


@pytest.mark.parametrize("left", [None, KEY[:-1]])
def test_a_key_that_is_gone_ends_the_run_in_words(
    new_run: Make, make_grid: Make, left: bytes | None
) -> None:
    folder = new_run(**HIDDEN)
    grid = make_grid(folder)

    next(iter(grid.sites.values())).change = stop_in(2)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(grid, folder)
    folder.noise_key.unlink()
    if left:
        folder.noise_key.write_bytes(left)
    with pytest.raises(RunError, match=r"expected the 32 bytes .*restore the file, or start a new"):
        run_rounds(make_grid(folder), folder)
