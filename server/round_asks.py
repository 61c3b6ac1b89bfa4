"""What each site is asked in a round: to train, or to measure only, from a state of its rank.

Sites compare each state with the base. In a version that started from an earlier release they
compare it with that, too, which comes along.
"""

import zlib
from collections.abc import Collection
from dataclasses import dataclass

from dafne_federated.core.rank_cut import Cut, Cuts, at_rank, site_ranks
from dafne_federated.core.state import State, state_rank
from dafne_federated.core.strategy_table import STRATEGY_TABLE, round_rule
from dafne_federated.core.wire import RoundRequest
from dafne_federated.core.wire_arrays import rounded, state_record
from dafne_federated.server.federation import Federation
from dafne_federated.server.questions import Ask
from dafne_federated.server.sampling import sampled


@dataclass(frozen=True)
class RoundAsks:
    """All questions of one round.

    Attributes:
        by_site: What each site is asked.
        training: Sites that are asked for an update.
        trains: Whether the round is one of training.
        whole: Whether every site gets the whole state.
    """

    by_site: dict[str, Ask]
    training: frozenset[str]
    trains: bool
    whole: bool


def round_asks(run: Federation, number: int, state: State) -> RoundAsks:
    """Return what the sites are asked in round ``number``, which starts from ``state``.

    The round after the last one of training only measures.
    """
    settings, trains = run.settings, number <= run.settings.rounds
    candidates = sorted(run.members.nodes) if trains else []
    if run.continued:  # the others have nothing new
        candidates = [name for name in candidates if name in run.continued.new_cases]
    training = frozenset(sampled(candidates, settings.sites_per_round, settings.seed, number))
    cuts = _cuts(run, number, state, training)
    asks = _asks(run, _request(run, number, trains), cuts, training)
    return RoundAsks(asks, training, trains, cuts.whole)


def _request(run: Federation, number: int, trains: bool) -> RoundRequest:
    settings, classes = run.settings, run.classes
    rule, mechanism = round_rule(settings.strategy, number), settings.mechanism
    return RoundRequest(
        run=run.info.run,
        round=number,
        base_digest=run.info.base_digest,
        plan_digest=run.info.plan_digest,
        epochs=settings.epochs if trains else 0,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate_in(number),
        seed=settings.seed,
        trained=rule.trained,
        sent=rule.sent,
        wire=settings.wire,
        class_pixels=list(classes.pixels) if classes and trains else None,
        class_slices=list(classes.slices) if classes and trains else None,
        noise=mechanism.noise if mechanism and trains else None,
        clip=mechanism.clip if mechanism and trains else None,
        person_rate=mechanism.rate if mechanism and trains else None,
        optimiser=settings.optimiser,
        proximal=settings.proximal,
        local_rank=settings.local_rank if STRATEGY_TABLE[settings.strategy].local else 0,
        first=run.from_release,
    )


def _cuts(run: Federation, number: int, state: State, training: Collection[str]) -> Cuts:
    """Cut the state to the rank of each site that trains; others measure the state itself."""
    settings, plan = run.settings, run.plan
    rules, rank = STRATEGY_TABLE[settings.strategy], state_rank(plan, state)
    ranks = dict.fromkeys(run.members.nodes, rank)
    if not rules.ranks or not training:
        return Cuts(ranks, {rank: Cut(state, {})})
    chosen = {site: run.members.ranks[site] for site in sorted(training)}
    ranks |= site_ranks(plan, state, chosen, rules.grows)
    seed = zlib.crc32(f"{settings.seed}/new directions/{number}".encode())
    cuts = {rank: at_rank(plan, state, rank, seed) for rank in sorted(set(ranks.values()))}
    wire = settings.wire
    return Cuts(ranks, {r: Cut(rounded(plan, c.state, wire), c.rest) for r, c in cuts.items()})


def _asks(
    run: Federation, request: RoundRequest, cuts: Cuts, training: Collection[str]
) -> dict[str, Ask]:
    """Return the messages; sites that are asked the same at one rank get the same one."""
    measuring = request.model_copy(update={"epochs": 0, "class_pixels": None, "class_slices": None})
    wire, first = request.wire, {}
    arrays = {r: state_record(run.plan, cut.state, wire) for r, cut in cuts.by_rank.items()}
    if request.first:
        first = {"first": state_record(run.plan, run.first, wire)}
    kinds = {s: (r, s in training) for s, r in cuts.ranks.items()}
    made: dict[tuple[int, bool], Ask] = {}
    for rank, trains in set(kinds.values()):
        own = request if trains else measuring
        content = own.to_record(arrays[rank])
        content.update(first)
        made[rank, trains] = Ask(own, content, cuts.by_rank[rank])
    return {site: made[kind] for site, kind in kinds.items()}
