"""What was spent is never forgotten, never counted twice, and never passes the bound."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dp_accounting")

from dafne_federated.client.privacy_ledger import KEY_BYTES, PrivacyLedger, Release
from dafne_federated.core.errors import ApprovalError
from dafne_federated.core.privacy_accountant import Spent, epsilon_of

DELTA = 1e-5


def release(ledger: PrivacyLedger, content: str, **changes: Any) -> Release:
    fields = {
        "name": ledger.name(content),
        "run": "a" * 32,
        "round": 1,
        "base_digest": "0" * 64,
        "noise": 4.0,
        "rate": 0.5,
        "steps": 4,
    } | changes
    return Release.model_validate(fields)


def cost(steps: int) -> float:
    return epsilon_of([Spent(4.0, 0.5, steps)], DELTA)


def test_the_key_is_secret_and_made_once(tmp_path: Path) -> None:
    one, other = PrivacyLedger(tmp_path / "one"), PrivacyLedger(tmp_path / "other")
    key = tmp_path / "one" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o700
    assert len(key.read_bytes()) == KEY_BYTES
    assert one.seed("x") == PrivacyLedger(tmp_path / "one").seed("x")
    assert len({one.seed("x"), one.seed("y"), other.seed("x"), bytes.fromhex(one.name("x"))}) == 4
    assert not [path for path in key.parent.iterdir() if path.name.startswith(".key")]


def test_a_round_that_is_asked_again_is_not_counted_again(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    first = ledger.spend(release(ledger, "x"), DELTA, 10)
    assert first == pytest.approx((cost(4), cost(4)))
    assert PrivacyLedger(tmp_path).spend(release(ledger, "x"), DELTA, 10) == first
    assert ledger.spend(release(ledger, "y", round=2), DELTA, 10)[1] == pytest.approx(cost(8))
    assert len(ledger.releases()) == 2


def test_all_runs_and_bases_of_a_site_add_up(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    ledger.spend(release(ledger, "x"), DELTA, 10)
    other = release(ledger, "y", run="b" * 32, base_digest="1" * 64)
    assert ledger.spend(other, DELTA, 10) == pytest.approx((cost(4), cost(8)))


def test_a_run_that_receives_what_another_asked_first_has_spent_it_too(tmp_path: Path) -> None:
    ledger, again = PrivacyLedger(tmp_path), "b" * 32
    for number, content in enumerate("xyz", start=1):
        ledger.spend(release(ledger, content, round=number), DELTA, 10)
    shared = [
        ledger.spend(release(ledger, content, round=number, run=again), DELTA, 10)
        for number, content in enumerate("xy", start=1)
    ]
    assert shared[0] == pytest.approx((cost(4), cost(12)))
    assert shared[1] == pytest.approx((cost(8), cost(12)))
    once_more = ledger.spend(release(ledger, "y", round=2, run=again), DELTA, 10)
    assert once_more == pytest.approx(shared[1])
    own = ledger.spend(release(ledger, "w", round=3, run=again), DELTA, 10)
    assert own == pytest.approx((cost(12), cost(16)))
    first = ledger.spend(release(ledger, "x"), DELTA, 10)
    assert first == pytest.approx((cost(12), cost(16)))
    kept = PrivacyLedger(tmp_path).releases()
    assert [old.later_runs for old in kept] == [(again,), (again,), (), ()]


def test_a_round_past_the_bound_is_refused_and_not_written(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    bound = (cost(4) + cost(8)) / 2
    ledger.spend(release(ledger, "x"), DELTA, bound)
    with pytest.raises(ApprovalError, match=r"one person's data .* take more noise or fewer"):
        ledger.spend(release(ledger, "y"), DELTA, bound)
    assert [old.name for old in ledger.releases()] == [ledger.name("x")]
    ledger.spend(release(ledger, "x"), DELTA, bound)  # what was spent can be asked for again


def test_what_is_damaged_or_gone_is_not_an_empty_ledger(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    ledger.spend(release(ledger, "x"), DELTA, 10)
    path = tmp_path / "ledger.json"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ApprovalError, match="damaged or gone"):
        ledger.spend(release(ledger, "y"), DELTA, 10)
    path.unlink()
    with pytest.raises(ApprovalError, match="restore the folder 'privacy'"):
        PrivacyLedger(tmp_path)


def test_a_ledger_that_is_lost_with_the_whole_cache_is_noticed(tmp_path: Path) -> None:
    folder, marker = tmp_path / "cache" / "privacy", tmp_path / "marker.json"
    PrivacyLedger(folder, marker=marker)
    shutil.rmtree(tmp_path / "cache")
    ledger = PrivacyLedger(folder, marker=marker)  # nothing was spent, nothing is lost
    ledger.spend(release(ledger, "x"), DELTA, 10)
    shutil.copytree(folder, tmp_path / "backup")
    ledger.spend(release(ledger, "y"), DELTA, 10)
    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):  # it is not made anew by asking again
        with pytest.raises(ApprovalError, match=r"gave 2 answers .* knows 0; .*'marker\.json'"):
            PrivacyLedger(folder, marker=marker)
    shutil.copytree(tmp_path / "backup", folder, dirs_exist_ok=True)
    with pytest.raises(ApprovalError, match=r"gave 2 answers with noise, and .* knows 1"):
        PrivacyLedger(folder, marker=marker)
    marker.unlink()  # the site's people say so
    again = PrivacyLedger(folder, marker=marker)
    assert again.spend(release(again, "y"), DELTA, 10)[1] == pytest.approx(cost(8))
    marker.write_text("{}")
    with pytest.raises(ApprovalError, match=r"'marker\.json' is damaged"):
        PrivacyLedger(folder, marker=marker)


def test_a_site_that_spent_before_there_were_markers_gets_one(tmp_path: Path) -> None:
    ledger, marker = PrivacyLedger(tmp_path / "privacy"), tmp_path / "marker.json"
    ledger.spend(release(ledger, "x"), DELTA, 10)
    PrivacyLedger(tmp_path / "privacy", marker=marker)
    shutil.rmtree(tmp_path / "privacy")
    with pytest.raises(ApprovalError, match="gave 1 answers"):
        PrivacyLedger(tmp_path / "privacy", marker=marker)


def test_a_new_key_makes_other_noise_and_so_another_release(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    ledger.spend(release(ledger, "x"), DELTA, 10)
    (tmp_path / "key").unlink()
    again = PrivacyLedger(tmp_path)
    assert again.spend(release(again, "x"), DELTA, 10)[1] == pytest.approx(cost(8))


def test_many_at_once_are_all_counted(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda n: PrivacyLedger(tmp_path).spend(release(ledger, str(n)), DELTA, 100),
                range(8),
            )
        )
    assert len(ledger.releases()) == 8


_SPENDS = """
import sys
from pathlib import Path
from dafne_federated.client.privacy_ledger import PrivacyLedger, Release
ledger, number = PrivacyLedger(Path(sys.argv[1])), 0
while True:
    number += 1
    ledger.spend(
        Release(name=str(number), run="a" * 32, round=number, base_digest="0" * 64,
                noise=50.0, rate=1.0, steps=1), 1e-5, 1e9)
    print(number, flush=True)
"""


def test_a_kill_forgets_nothing_that_was_spent(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _SPENDS, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    kept = [old.round for old in PrivacyLedger(tmp_path).releases()]
    assert set(told) <= set(kept) == set(range(1, len(kept) + 1))
    PrivacyLedger(tmp_path).spend(release(PrivacyLedger(tmp_path), "x"), DELTA, 1e9)  # not locked
