"""A whole federation hides its persons: end to end, and the server never sees a loss."""

import json
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]
pytest.importorskip("dp_accounting")

from dafne_federated.core.privacy_accountant import Spent, epsilon_of  # noqa: E402
from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402

PRIVATE = {
    "rounds": 2, "epochs": 2, "threads": 2, "device": "cpu", "gate": "none",
    "strategy": "frozen-a", "privacy": "person", "noise": 4.0, "clip": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def private(run_one: Callable[..., RunFolder]) -> RunFolder:
    return run_one("private", settings=RunSettings.model_validate(PRIVATE))


def test_each_round_says_what_was_spent_and_no_loss(private: RunFolder) -> None:
    *trained, last = private.rounds()
    assert [line.trained for line in (*trained, last)] == [True, True, False]
    for number, line in enumerate(trained, start=1):
        expected = epsilon_of([Spent(4.0, 0.5, 4 * number)], 1e-5)
        for site in line.sites.values():
            assert (site.status, site.loss, site.training_slices) == ("ok", None, None)
            assert (site.steps, site.delta) == (4, 1e-5)
            assert site.epsilon == pytest.approx(expected)
            assert site.update_norm > 0
    assert all(site.epsilon is None for site in last.sites.values())


def test_the_report_names_the_unit_and_every_site(private: RunFolder) -> None:
    page = private.report.read_text(encoding="utf-8")
    assert "The unit is one <strong>person</strong>" in page
    section = page.split("<h2>Privacy of persons</h2>")[1].split("</section>")[0]
    epsilon = epsilon_of([Spent(4.0, 0.5, 8)], 1e-5)
    for name in private.rounds()[0].sites:
        row = section.split(f'<th scope="row">{name}</th>')[1].split("</tr>")[0]
        assert f">{epsilon:.3g}<" in row
        assert ">8<" in row
    assert "it protects nobody" in section
    assert ">None<" not in page


def test_the_same_seed_gives_the_same_bits(
    private: RunFolder, run_one: Callable[..., RunFolder]
) -> None:
    again = run_one("again", settings=RunSettings.model_validate(PRIVATE))
    digests: list[Any] = [[line.state_digest for line in f.rounds()] for f in (private, again)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 2  # the last line evaluates what the one before it made


def test_a_key_and_a_ledger_lie_at_each_site(private: RunFolder) -> None:
    keys = []
    for name in private.rounds()[0].sites:
        folder = private.path / "cache" / name / "privacy"
        keys.append((folder / "key").read_bytes())
        kept = json.loads((folder / "ledger.json").read_text())["releases"]
        assert [(old["round"], old["steps"]) for old in kept] == [(1, 4), (2, 4)]
    assert len(set(keys)) == len(keys)
