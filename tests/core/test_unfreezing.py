"""Stages grow from the output backwards and end in the whole plan."""

import itertools

import pytest

from dafne_federated.core.methods import METHODS, plan_targets
from dafne_federated.core.plan import AdaptationPlan, Layer
from dafne_federated.core.state import initial_state
from dafne_federated.core.unfreezing import part_of, stages

KINDS = {"down": "conv", "norm": "norm", "up": "conv-transpose", "head": "conv"}
WEIGHTS = {
    "down": {"kernel": ("0000", (3, 3, 1, 8)), "bias": ("0001", (8,))},
    "norm": {"gamma": ("0002", (8,)), "beta": ("0003", (8,))},
    "up": {"kernel": ("0006", (2, 2, 8, 8)), "bias": ("0007", (8,))},
    "head": {"kernel": ("0008", (1, 1, 8, 3)), "bias": ("0009", (3,))},
}
LAYERS = tuple(
    Layer(name=name, kind=kind, weights=WEIGHTS[name], depth=depth, decoder=depth > 1)
    for depth, (name, kind) in enumerate(KINDS.items())
)


def plan_of(method: str) -> AdaptationPlan:
    return AdaptationPlan(
        base_digest="0" * 64,
        method=method,
        rank=2,
        max_rank=2,
        scale=1,
        labels=("a", "b"),
        targets=plan_targets(method, LAYERS),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 11])
def test_each_stage_trains_more_and_the_last_one_all(method: str, epochs: int) -> None:
    plan = plan_of(method)
    found = stages(plan, LAYERS, "gradual", epochs)
    assert sum(stage.epochs for stage in found) == epochs
    assert min(stage.epochs for stage in found) >= 1
    assert found[-1].plan == plan
    for earlier, later in itertools.pairwise(found):
        assert set(earlier.plan.targets) < set(later.plan.targets)


def test_gradual_means_head_then_decoder_then_all() -> None:
    found = stages(plan_of("lora"), LAYERS, "gradual", 10)
    keys = [(s.name, s.epochs, [t.key for t in s.plan.targets]) for s in found]
    assert keys == [
        ("head", 3, ["0008", "0009"]),
        ("decoder", 3, ["0006", "0008", "0009"]),
        ("all", 4, ["0000", "0006", "0008", "0009"]),
    ]


def test_all_is_one_stage() -> None:
    (stage,) = stages(plan_of("full"), LAYERS, "all", 7)
    assert (stage.name, stage.epochs, stage.plan) == ("all", 7, plan_of("full"))


def test_a_method_that_leaves_the_head_begins_with_what_it_trains() -> None:
    found = stages(plan_of("norm"), LAYERS, "gradual", 4)
    assert [(stage.name, stage.epochs) for stage in found] == [("all", 4)]


def test_a_part_of_a_state_holds_what_its_plan_trains() -> None:
    plan = plan_of("lora")
    state = initial_state(plan, 1)
    head = stages(plan, LAYERS, "gradual", 3)[0].plan
    assert part_of(state, head).keys() == {"0008/delta", "0009/delta"}
    assert part_of(state, plan).keys() == state.keys()
