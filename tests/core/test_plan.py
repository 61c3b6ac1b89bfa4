"""A plan travels as text unchanged, names its targets, and refuses what it cannot do."""

import numpy as np
import pytest

from dafne_federated.core.errors import AdapterError, MessageError
from dafne_federated.core.plan import AdaptationPlan, Layer, Target, lora_targets


def layer(name: str, index: int, kind: str = "conv", **more: object) -> Layer:
    shape = (3, 3, 4, 8) if kind != "dense" else (4, 8)
    weights = {"kernel": (f"{index:04d}", shape), "bias": (f"{index + 1:04d}", (8,))}
    return Layer.model_validate(
        {"name": name, "kind": kind, "weights": weights, "depth": index, "decoder": False} | more
    )


LAYERS = [
    layer("down", 0),
    layer("grouped", 2, refused="grouped convolutions have no useful low rank per group"),
    layer("up", 4, "conv-transpose", decoder=True),
    layer("head", 6, decoder=True),
]


@pytest.fixture
def plan() -> AdaptationPlan:
    return AdaptationPlan(
        base_digest="0" * 64,
        method="lora",
        rank=2,
        max_rank=4,
        scale=1.0,
        labels=("a", "b"),
        targets=lora_targets(LAYERS),
    )


def test_text_round_trip(plan: AdaptationPlan) -> None:
    back = AdaptationPlan.from_json(plan.to_json())
    assert back == plan
    assert back.digest == plan.digest


def test_every_change_changes_the_digest(plan: AdaptationPlan) -> None:
    for change in ({"scale": 2.0}, {"rank": 3}, {"labels": ("b", "a")}):
        assert plan.model_copy(update=change).digest != plan.digest


@pytest.mark.parametrize(
    ("where", "kernels"), [("all", ["0000", "0004"]), ("decoder", ["0004"]), ("encoder", ["0000"])]
)
def test_targets_are_the_chosen_kernels_and_the_whole_head(where: str, kernels: list[str]) -> None:
    targets = lora_targets(LAYERS, where)
    assert [t.key for t in targets if t.kind != "delta"] == kernels
    assert [(t.key, t.kind) for t in targets if t.layer == "head"] == [
        ("0006", "delta"),
        ("0007", "delta"),
    ]


def test_nothing_to_adapt_is_said_with_the_reason() -> None:
    with pytest.raises(AdapterError, match=r"no layer among 'all'.*grouped convolutions"):
        lora_targets([LAYERS[1], LAYERS[3]])
    with pytest.raises(AdapterError, match="expected one of all, decoder, encoder, got 'top'"):
        lora_targets(LAYERS, "top")


def test_shapes_at_a_rank(plan: AdaptationPlan) -> None:
    shapes = plan.state_shapes(3)
    assert shapes["0000/a"] == (3, 3, 4, 3)
    assert shapes["0000/b"] == (3, 8)
    # A transposed kernel is (window, out, in): 1 x 1 from 8 inputs, then the window to 4.
    assert shapes["0004/a"] == (8, 3)
    assert shapes["0004/b"] == (3, 3, 3, 4)
    assert shapes["0006/delta"] == (3, 3, 4, 8)


@pytest.mark.parametrize(
    ("kind", "shape", "scale"),
    [
        ("scale", (3, 3, 4, 8), (8,)),
        ("scale", (8,), (8,)),
        ("scale-transpose", (2, 2, 5, 8), (5, 1)),
        ("scale-depthwise", (3, 3, 4, 2), (4, 2)),
    ],
)
def test_a_scale_has_one_value_for_each_output_channel(
    kind: str, shape: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    target = Target.model_validate({"key": "0000", "layer": "x", "kind": kind, "shape": shape})
    assert not target.low_rank
    assert target.arrays(4) == {"scale": scale}
    assert np.broadcast_shapes(shape, scale) == shape


def test_parameters_are_counted_at_the_rank_of_the_plan(plan: AdaptationPlan) -> None:
    pair, turned = 2 * (3 * 3 * 4 + 8), 2 * (8 + 3 * 3 * 4)
    assert plan.parameters == pair + turned + 3 * 3 * 4 * 8 + 8
    assert plan.wire_bytes == 4 * plan.parameters


@pytest.mark.parametrize("kind", ["conv", "conv-transpose", "dense", "scale-transpose"])
def test_kinds_need_their_axes(kind: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{kind}: expected a shape of at least 2 axes, got \(5,\)"
    ):
        Target.model_validate({"key": "0000", "layer": "x", "kind": kind, "shape": (5,)})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"rank":2', '"rank":0', "rank"),
        ('"scale":1.0', '"scale":NaN', "scale"),
        ('"method"', '"colour":1,"method"', "colour"),
        ('"0000"', '"zero"', "targets.0.key"),
    ],
)
def test_bad_text_is_named(plan: AdaptationPlan, old: str, new: str, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        AdaptationPlan.from_json(plan.to_json().replace(old, new, 1))


def test_target_kinds_are_closed() -> None:
    with pytest.raises(ValueError, match="kind"):
        Target.model_validate({"key": "0000", "layer": "x", "kind": "exec", "shape": (1,)})


def statistic(key: str, kind: str, channels: int = 8) -> Target:
    return Target.model_validate({"key": key, "layer": "n", "kind": kind, "shape": (channels,)})


def with_targets(plan: AdaptationPlan, *more: Target) -> AdaptationPlan:
    return AdaptationPlan.model_validate(plan.model_dump() | {"targets": [*plan.targets, *more]})


def test_statistics_are_part_of_the_state_but_not_of_what_is_trained(plan: AdaptationPlan) -> None:
    pair = (statistic("0010", "mean"), statistic("0011", "variance"))
    wider = with_targets(plan, *pair)
    assert wider.normalisations == (pair,)
    assert wider.state_shapes(trained=False) == {"0010/delta": (8,), "0011/delta": (8,)}
    assert wider.state_shapes(trained=True) == plan.state_shapes()
    assert wider.state_shapes() == plan.state_shapes() | wider.statistics_shapes(1)
    assert wider.parameters == plan.parameters
    assert wider.wire_bytes == plan.wire_bytes + 4 * 16
    assert wider.statistics_shapes(0) == plan.statistics_shapes(1) == {}


@pytest.mark.parametrize(
    "targets",
    [
        (statistic("0010", "mean"),),
        (statistic("0010", "variance"), statistic("0011", "mean")),
        (statistic("0010", "mean"), statistic("0011", "variance", channels=4)),
    ],
)
def test_statistics_that_are_no_pairs_are_refused(
    plan: AdaptationPlan, targets: tuple[Target, ...]
) -> None:
    with pytest.raises(ValueError, match="expected a mean and a variance of one shape"):
        with_targets(plan, *targets)
