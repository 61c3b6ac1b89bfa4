"""The words about the aggregation error are those of the strategy, and of no other."""

from collections.abc import Sequence

import pytest

from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RoundLine, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.strategy_table import STRATEGY_TABLE
from dafne_federated.simulations.aggregation_words import aggregation_words


def words(
    plan: AdaptationPlan, strategy: str, errors: Sequence[float | None], whole: bool = True
) -> str:
    settings = RunSettings(strategy=strategy, method="head" if strategy == "fedavg" else "lora")
    info = RunInfo(
        run="0" * 32,
        created=1,
        base_digest="0" * 64,
        base_name="Base",
        plan_digest="0" * 64,
        settings=settings,
        versions={},
        command="",
    )
    if strategy == "fedavg":
        plan = plan.model_copy(
            update={"targets": tuple(target for target in plan.targets if not target.low_rank)}
        )
    rounds = [
        RoundLine(
            round=number,
            trained=error is not None,
            sites={},
            aggregation_error=error,
            state_digest="",
            seconds=1,
            whole=whole,
        )
        for number, error in enumerate(errors, start=1)
    ]
    return aggregation_words(info, plan, rounds)


def test_each_strategy_says_what_its_error_is(small_plan: AdaptationPlan) -> None:
    found = {name: words(small_plan, name, [0.125, 0.04, None]) for name in STRATEGY_TABLE}
    shown = "by round, as a share of the exact mean update: 12.5\u202f%, 4\u202f%."
    for name in ("product", "stack", "factors", "global+local"):
        assert shown in found[name]
    assert "the cut of the mean update to rank 2" in found["product"]
    assert "beyond the 6 directions that max-rank allows" in found["stack"]
    assert "cross terms" in found["factors"]
    assert "of the global part to rank 2" in found["global+local"]
    for name in ("frozen-a", "alternating"):
        assert "none; one factor of each pair is the same at all sites" in found[name]
    assert "nobody but the sites knows what their own factors do" in found["shared-a"]
    assert "none; whole arrays add up" in found["fedavg"]
    assert all(text.startswith("Aggregation error") for text in found.values())


def test_sites_of_smaller_rank_are_told_of(small_plan: AdaptationPlan) -> None:
    assert "smaller rank" not in words(small_plan, "product", [0.1])
    assert "Sites of smaller rank trained a cut" in words(small_plan, "product", [0.1], whole=False)


@pytest.mark.parametrize("errors", [[], [None]])
def test_without_a_round_of_training_there_is_nothing_to_say(
    small_plan: AdaptationPlan, errors: list[float | None]
) -> None:
    assert words(small_plan, "product", errors) == ""
