"""Stages of training: everything at once, or from the output of a network backwards.

Each stage is an ordinary plan that trains a part of the whole plan's targets, and no stage
leaves out what an earlier one trained. The first stages lie behind a long frozen prefix, so
with kept features they cost little. Statistics that are set once hold in all stages.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dafne_federated.core.fine_tuning_settings import Schedule
from dafne_federated.core.plan import AdaptationPlan, Layer, split_head
from dafne_federated.core.state import State


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: ``head``, ``decoder`` or ``all``.
        plan: What it trains.
        epochs: At most so many.
    """

    name: str
    plan: AdaptationPlan
    epochs: int


def stages(
    plan: AdaptationPlan, layers: Iterable[Layer], schedule: Schedule, epochs: int
) -> tuple[Stage, ...]:
    """Return the stages of a schedule, the one that trains the whole plan last.

    ``gradual``: the head; then what the plan trains in the decoder, too; then all of it. A
    stage that would train nothing, or nothing new, is left out. The epochs are shared out
    evenly; what is left over goes to the last stages, and so do all where they are too few.

    Args:
        plan: The whole plan.
        layers: The network, in the order of its weights.
        schedule: ``all`` or ``gradual``.
        epochs: Epochs of all stages together.

    Source:
        Gradual unfreezing, https://arxiv.org/abs/1801.06146, section 3.3.
    """
    layers = tuple(layers)
    _, head = split_head(layers)
    last = {key for key, _ in head.weights.values()}
    decoder = {key for layer in layers if layer.decoder for key, _ in layer.weights.values()}
    set_once = {target.key for target in plan.targets if not target.trained}
    everything = {target.key for target in plan.targets if target.trained}
    wanted = [("all", everything)]
    if schedule == "gradual":
        wanted = [("head", last), ("decoder", last | decoder), *wanted]
    found: list[tuple[str, AdaptationPlan]] = []
    for name, keys in wanted:
        if not keys & everything:
            continue
        targets = tuple(target for target in plan.targets if target.key in keys | set_once)
        if not found or len(targets) > len(found[-1][1].targets):
            found.append((name, plan.model_copy(update={"targets": targets})))
    found = found[-min(epochs, len(found)) :]
    count = len(found)
    return tuple(
        Stage(name, part, (epochs + index) // count) for index, (name, part) in enumerate(found)
    )


def part_of(state: State, plan: AdaptationPlan) -> State:
    """Return the arrays of ``state`` that the plan of a stage holds."""
    return {key: state[key] for key in plan.state_shapes()}
