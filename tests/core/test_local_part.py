"""A local part adds to everybody's without changing it, and is taken off without a trace."""

from collections.abc import Callable

import numpy as np
import pytest

from dafne_federated.core.local_part import global_part, silenced, with_local
from dafne_federated.core.low_rank import dense_product
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, check_state

Make = Callable[..., State]


def product(state: State, key: str) -> np.ndarray:
    return dense_product((state[f"{key}/a"], state[f"{key}/b"]))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_new_local_part_changes_nothing_and_comes_off_bit_for_bit(
    make_state: Make, small_plan: AdaptationPlan, rank: int
) -> None:
    state = make_state(0)
    whole = with_local(state, None, rank, seed=5)
    check_state(small_plan, whole)
    assert whole["0000/a"].shape[-1] == 2 + rank
    for key in ("0000", "0002", "0004"):
        np.testing.assert_array_equal(product(whole, key), product(state, key))
        assert np.abs(whole[f"{key}/a"]).min() > 0  # else it would have no gradient
    back = global_part(whole, rank)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], value) for key, value in state.items())


def test_everybodys_and_a_sites_own_part_add_up(
    make_state: Make, small_plan: AdaptationPlan
) -> None:
    own, new = make_state(1, 5), make_state(2)
    whole = with_local(new, own, 3, seed=0)
    for key in ("0000", "0002", "0004"):
        local = {f"{key}/a": own[f"{key}/a"][..., 2:], f"{key}/b": own[f"{key}/b"][2:]}
        want = product(new, key) + product(local, key)
        np.testing.assert_allclose(product(whole, key), want, atol=1e-5)
        quiet = silenced(whole, 3)
        np.testing.assert_array_equal(product(quiet, key), product(new, key))
        assert (product(whole, key) != product(quiet, key)).any()  # the other one was not changed
    check_state(small_plan, whole)
    np.testing.assert_array_equal(whole["0006/delta"], new["0006/delta"])


def test_the_same_seed_gives_the_same_local_part(make_state: Make) -> None:
    one, same, other = (with_local(make_state(0), None, 2, seed)["0004/a"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
