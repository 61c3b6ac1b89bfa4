"""Names of methods are checked and combined in words, before any network is built."""

import math

import pytest

from dafne_federated.core.errors import AdapterError, SettingsError
from dafne_federated.core.methods import (
    METHODS,
    Choices,
    frozen_share,
    method_parts,
    method_words,
    plan_targets,
)
from dafne_federated.core.plan import AdaptationPlan, Layer
from dafne_federated.core.settings import RunSettings, read_settings


def some_layer(name: str, index: int, kind: str = "conv", decoder: bool = False) -> Layer:
    weights = {"kernel": (f"{index:04d}", (3, 3, 4, 8)), "bias": (f"{index + 1:04d}", (8,))}
    return Layer(name=name, kind=kind, weights=weights, depth=index, decoder=decoder)  # type: ignore[arg-type]


PLAIN = [some_layer("down", 0), some_layer("up", 2, "conv-transpose", True), some_layer("top", 4)]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("adapters", "no method 'adapters'; there are head, last-k, decoder"),
        ("lora+", "no method ''; there are"),
        ("lora+lora", "'lora' and 'lora' cannot be combined: it is the same twice"),
        ("full+head", "'full' and 'head' cannot be combined: 'full' trains everything already"),
        ("lora+norm+ssf", "'lora' and 'ssf' cannot be combined: both change each kernel"),
        ("ssf+bias", "cannot be combined: 'ssf' shifts each layer already"),
    ],
)
def test_nonsense_is_refused_before_any_network_is_built(method: str, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        method_parts(method)


def keys_of(method: str, choices: Choices | None = None) -> list[tuple[str, str]]:
    return [(t.key, t.kind) for t in plan_targets(method, PLAIN, choices)]


def test_what_finds_or_adds_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="'norm' finds nothing in this network: it trains scale"):
        keys_of("norm")
    with pytest.raises(AdapterError, match="'bias' adds nothing to 'decoder\\+encoder' on this"):
        keys_of("decoder+encoder+bias")
    with pytest.raises(AdapterError, match="'lora' adds nothing to 'decoder'"):
        keys_of("lora+decoder", Choices(where="decoder"))
    with pytest.raises(AdapterError, match="last: expected at most the 3 layers with kernels"):
        keys_of("last-k", Choices(last=4))
    with pytest.raises(AdapterError, match="no layer with a kernel"):
        plan_targets("head", [])


def test_the_whole_takes_the_place_of_its_part() -> None:
    head = [("0004", "delta"), ("0005", "delta")]
    assert keys_of("head") == head
    assert keys_of("lora+last-k") == [
        ("0000", "conv"),
        ("0002", "delta"),
        ("0003", "delta"),
        *head,
    ]
    assert keys_of("last-k", Choices(last=1)) == head
    assert keys_of("ssf") == [
        ("0000", "scale"),
        ("0001", "delta"),
        ("0002", "scale-transpose"),
        ("0003", "delta"),
        *head,
    ]


def test_words_are_for_people() -> None:
    for name, method in METHODS.items():
        assert 10 < len(method.trains) < 60, name
        assert method.trains[0].islower()
    assert method_words("norm+bias") == (
        "scale and shift of the normalisations; all biases and shifts; the head's kernel stays"
    )


def test_settings_know_the_methods() -> None:
    settings = read_settings(None, method="lora+norm", layers="decoder")
    assert RunSettings.model_validate_json(settings.model_dump_json(by_alias=True)) == settings
    with pytest.raises(SettingsError, match=r"method: .*no method 'best'; there are head, last-k"):
        read_settings(None, method="best")
    with pytest.raises(SettingsError, match=r"layers: .*only method 'lora' chooses among layers"):
        read_settings(None, method="head", layers="decoder")


def test_the_share_of_work_follows_the_layers() -> None:
    worked = [
        layer.model_copy(update={"work": w}) for layer, w in zip(PLAIN, (30, 50, 20), strict=True)
    ]
    for method, share in (("head", 0.8), ("decoder", 0.3), ("encoder", 0.0)):
        assert frozen_share(worked, plan_targets(method, worked)) == pytest.approx(share)
    assert frozen_share(PLAIN, plan_targets("head", PLAIN)) is None


def test_a_plan_counts_what_its_states_hold() -> None:
    plan = AdaptationPlan(
        base_digest="0" * 64,
        method="ssf",
        rank=1,
        max_rank=1,
        scale=1.0,
        labels=("a",),
        targets=plan_targets("ssf", PLAIN),
    )
    assert plan.parameters == 8 + 8 + 4 + 8 + math.prod((3, 3, 4, 8)) + 8
    assert plan.wire_bytes == 4 * plan.parameters
