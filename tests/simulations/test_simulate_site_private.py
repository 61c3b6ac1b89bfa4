"""A whole federation hides its sites: end to end, with the same bits from the same seed."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]
pytest.importorskip("dp_accounting")

from dafne_federated.core.run_folder import RunFolder  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402
from dafne_federated.server.site_noise import site_epsilon  # noqa: E402
from dafne_federated.simulations.simulated_privacy import keep_simulated_key  # noqa: E402

HIDDEN = RunSettings.model_validate(
    {
        "rounds": 2, "epochs": 1, "threads": 2, "device": "cpu", "gate": "none",
        "strategy": "frozen-a", "privacy": "site", "noise": 1.0, "clip": 0.05,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def hidden(run_one: Callable[..., RunFolder]) -> RunFolder:
    return run_one("hidden", settings=HIDDEN)


def test_the_report_names_the_unit_what_was_spent_and_what_is_not_covered(
    hidden: RunFolder,
) -> None:
    page = hidden.report.read_text(encoding="utf-8")
    section = page.split("<h2>Privacy of hospitals</h2>")[1].split("</section>")[0]
    assert "The unit is one <strong>site</strong>" in section
    for rounds in (1, 2):
        row = section.split(f'<th scope="row">{rounds}</th>')[1].split("</tr>")[0]
        assert f">{site_epsilon(HIDDEN, rounds):.3g}<" in row
    assert '<th scope="row">3</th>' not in section  # nobody trained in the last round
    for words in ("With 4 to 10 hospitals", "costs the accuracy", "Dice", "choice of the round"):
        assert words in section
    assert "Privacy of persons" not in page
    assert "None" not in section


def test_the_same_seed_gives_the_same_bits_and_another_one_other_noise(
    hidden: RunFolder, run_one: Callable[..., RunFolder], tmp_path: Path
) -> None:
    again = run_one("again", settings=HIDDEN)
    digests = [[line.state_digest for line in folder.rounds()] for folder in (hidden, again)]
    assert digests[0] == digests[1]
    other = RunFolder(tmp_path)
    keep_simulated_key(other, HIDDEN.model_copy(update={"seed": 2}))
    assert hidden.noise_key.read_bytes() != other.noise_key.read_bytes()


def test_the_key_is_its_owners_alone_and_in_no_file_that_is_given_away(hidden: RunFolder) -> None:
    key = hidden.noise_key.read_bytes()
    assert hidden.noise_key.stat().st_mode & 0o777 == 0o600
    files = [path for path in hidden.path.rglob("*") if path.is_file() and path != hidden.noise_key]
    assert [path for path in files if hidden.release in path.parents]

    def holds(path: Path) -> bool:
        data = path.read_bytes()
        return key in data or key.hex().encode() in data

    assert not [path for path in files if holds(path)]
