"""The recommended method is the first of a fixed order that fits the machine."""

import pytest

pytestmark = pytest.mark.slow  # imports Keras

pytest.importorskip("keras")

from dafne_federated.core.dry_run import DryRun  # noqa: E402 - after the check for Keras
from dafne_federated.core.method_costs import (  # noqa: E402
    Cost,
    left_out,
    recommend,
    usual_settings,
)
from dafne_federated.core.methods import METHODS  # noqa: E402
from dafne_federated.core.plan import Layer  # noqa: E402
from dafne_federated.core.settings import RunSettings  # noqa: E402


def cost(method: str, seconds: float | None = 1.0, mib: float = 500.0, share: float = 0.1) -> Cost:
    return Cost(
        method, "something", parameters=1000, bytes=4000, share=share,
        epoch_seconds=seconds, peak_mib=None if seconds is None else mib,
    )  # fmt: skip


DECODER = "lora --layers decoder"


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ([cost("full"), cost("head"), cost("lora")], "lora, the first that fits (1,000 values"),
        ([cost("full"), cost("head"), cost("lora", share=0.6)], "full, the first"),
        ([cost("head"), cost("lora", 301), cost(DECODER)], f"{DECODER}, the first"),
        ([cost("head"), cost("lora", mib=900), cost("ssf")], "ssf, the first"),
        ([cost("head", 900), cost("norm", 700), cost("lora", 901)], "norm, the fastest that"),
        ([cost("head", None), cost("lora", None)], "lora, the first"),
        ([cost("full", mib=900), cost("lora", share=0.6)], "lora, the first"),
    ],
)
def test_the_rule(costs: list[Cost], words: str) -> None:
    assert recommend(costs, 1000.0).startswith(f"Recommended here: --method {words}")


def test_nothing_fits() -> None:
    refused = Cost("lora", "something", refused="grouped")
    failed = Cost("head", "something", failed="memory")
    assert recommend([refused, failed, cost("norm", mib=801)], 1000.0) == (
        "No method fits this model and the memory of this machine."
    )
    assert "--method norm" in recommend([cost("norm", mib=801)], None)


def test_the_sentence_has_the_figures() -> None:
    assert recommend([cost("lora", 12.34, 512.3)], None).endswith(
        "(1,000 values, 0.004 MB each way, 12.3 s an epoch, at most 512 MiB of memory)."
    )
    assert "time and memory not measured" in recommend([cost("lora", None)], None)


def test_an_epoch_is_its_full_steps() -> None:
    run = DryRun(2.0, 800.0, 300.0, 1, "CPU")
    found = cost("lora", None).measured(run, slices=11, batch_size=4)
    assert (found.epoch_seconds, found.peak_mib, found.training_mib) == (4.0, 800.0, 500.0)
    assert cost("lora", None).measured(run, slices=3, batch_size=4).epoch_seconds == 2.0
    unknown = DryRun(2.0, None, None, 1, "CPU")
    assert cost("lora", None).measured(unknown, 8, 4).training_mib is None


def test_every_method_of_the_table_is_shown() -> None:
    shown = usual_settings(RunSettings(rank=3))
    assert {settings.method for settings in shown} == {*METHODS, "lora+norm"}
    assert ("lora", "decoder") in {(settings.method, settings.layers) for settings in shown}
    assert {settings.rank for settings in shown} == {3}


def test_what_lora_leaves_out_is_said_with_the_reason() -> None:
    weights = {"kernel": ("0000", (3, 3, 2, 4))}
    grouped = [
        Layer(name=str(i), kind="conv", weights=weights, depth=i, decoder=False, refused="grouped")
        for i in range(2)
    ]
    norm = grouped[0].model_copy(update={"weights": {"gamma": ("0001", (4,))}})
    assert left_out([*grouped, norm]) == ["lora leaves 2 layers as they are: grouped."]
