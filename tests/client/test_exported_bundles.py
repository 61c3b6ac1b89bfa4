"""What Dafne's desktop program exports is data of a site as it is: the same bits as NIfTI pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("backend")]

from dafne_federated.core.model_file import read_model  # noqa: E402
from dafne_federated.core.plan import AdaptationPlan  # noqa: E402
from dafne_federated.core.wire import RoundReply  # noqa: E402
from dafne_federated.core.wire_arrays import take_state  # noqa: E402
from tests.client.conftest import SiteUnderTest  # noqa: E402


@pytest.fixture
def answer(plan: AdaptationPlan, trained: Any, tmp_path: Path) -> Callable[[Path], Any]:
    """A function that lets a site with this folder train and measure once."""

    def ask(data: Path) -> Any:
        path = tmp_path / data.name
        path.mkdir()
        site = SiteUnderTest(path, data)
        site.approvals.add(read_model(trained.path), "test")
        assert site.offer(plan).status == "need"
        site.send_base(trained.path.read_bytes(), plan.base_digest)
        content = site.round(plan)
        return RoundReply.from_record(content), take_state(content, plan, "float32")

    return ask


def test_a_site_trains_and_measures_with_them_as_with_nifti_pairs(
    answer: Callable[[Path], Any], plan: AdaptationPlan, squares_folder: Path, bundles_folder: Path
) -> None:
    (reply, state), (other, same) = answer(squares_folder), answer(bundles_folder)
    assert reply.status == other.status == "ok"
    assert reply.training_cases == other.training_cases == 2
    assert reply.dice == other.dice
    assert min(reply.dice) > 0.5
    for key in plan.state_shapes():
        np.testing.assert_array_equal(state[key], same[key])
