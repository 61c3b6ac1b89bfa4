"""The baseline that every federation must face: each site alone with the same base."""

from collections.abc import Callable

from dafne_federated.client.site import Site, dice_by_label
from dafne_federated.core.metrics import mean
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State


def train_alone(
    site: Site,
    plan: AdaptationPlan,
    start: State,
    settings: RunSettings,
    on_round: Callable[[str], None],
) -> State:
    """Return the best state that a site reaches without the others, base included.

    It trains as often and as long as in the federation, from the same first state, with its own
    statistics and class frequencies where the federation pools them, and keeps
    the state with the best mean Dice on its own validation cases; without such cases, the last.

    Args:
        site: The site.
        plan: The plan of the federation.
        start: The first state of the federation.
        settings: Those of the federation.
        on_round: Called after each round with a note.
    """
    best, best_dice = start, _validation_dice(site, plan, start)
    state = site.own_statistics(plan, start)
    own = settings.class_weights == "pooled"
    classes = site.class_counts(plan)[0] if own else None
    kept = settings.optimiser == "kept"
    optimiser = site.cache.optimiser("alone", site.settings.name, plan, "both") if kept else None
    for number in range(1, settings.rounds + 1):
        state, _, _ = site.train(
            plan,
            state,
            settings.epochs,
            settings.batch_size,
            settings.learning_rate_in(number),
            settings.seed,
            number,
            classes=classes,
            optimiser=optimiser,
        )
        score = _validation_dice(site, plan, state)
        if score is None or best_dice is None or score > best_dice:
            best, best_dice = state, score
        on_round(site.settings.name)
    return best


def _validation_dice(site: Site, plan: AdaptationPlan, state: State) -> float | None:
    if not site.settings.validation:
        return None
    values, counts = dice_by_label(plan, site.evaluate(plan, state))
    return mean([value for value, count in zip(values, counts, strict=True) if count])
