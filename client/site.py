"""One hospital: its data, its consent, its training and its evaluation.

Whatever a message can ask of a site happens here, on top of its consent; ``app.py`` carries it.
"""

import logging
import zlib
from dataclasses import dataclass, field

import numpy as np

from dafne_federated.client.consent import Consent
from dafne_federated.client.limits import Clock, require_epochs
from dafne_federated.client.optimiser_files import OptimiserFiles
from dafne_federated.client.site_data import SiteData
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.backend import Device, prepare_backend, set_seed
from dafne_federated.core.batch_statistics import measure, recalibrate
from dafne_federated.core.class_weights import ClassCounts, class_counts
from dafne_federated.core.errors import MessageError
from dafne_federated.core.evaluation import evaluate_case
from dafne_federated.core.local_part import with_local
from dafne_federated.core.metrics import Agreement, judged, mean
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.moments import Moments
from dafne_federated.core.partial_labels import marginal_loss
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.private_training import PrivateTraining
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.state import State, initial_state, state_rank
from dafne_federated.core.strategy_table import Factors
from dafne_federated.core.suffix_training import SuffixTraining
from dafne_federated.core.training import TrainingResult
from dafne_federated.core.wire import RoundRequest

log = logging.getLogger(__name__)


@dataclass
class Engine:
    """A base with a plan attached, ready to train; expensive to make, so kept.

    What trains is compiled once for each set of factors that moves and each set of labels that a
    site lacks, for these decide the loss: with strategy ``alternating`` there are two, which share
    the network and its weights. Each keeps a compiled step and, while it runs, an optimiser of
    its own.
    """

    model: RunningModel
    adapted: AdaptedNetwork
    trainings: dict[tuple[Factors, float, tuple[int, ...]], SuffixTraining] = field(
        default_factory=dict
    )
    private: PrivateTraining | None = None


@dataclass
class _Kept:
    """What this process keeps between messages."""

    engine_key: tuple[str, str, int, str] | None = None
    engine: Engine | None = None


_KEPT = _Kept()


class Site(Consent):
    """What one site does.

    Args:
        settings: The site.
    """

    def __init__(self, settings: SiteSettings) -> None:
        super().__init__(settings)
        self.data = SiteData(settings, self.cache)
        self.clock = Clock(settings.max_seconds)

    def evaluate(self, plan: AdaptationPlan, state: State) -> list[Agreement]:
        """Return the Dice of ``state`` on the validation cases, in the images' own geometry."""
        engine = self.engine(plan, state_rank(plan, state))
        engine.adapted.write(state)
        rows = []
        for case in self.data.cases(self.settings.validation, plan.labels):
            self.clock.check()
            rows += evaluate_case(
                engine.model,
                case,
                engine.adapted.predict,
                self.settings.classification,
                self.data.bias_fields(),
                distances=False,
            )
        return rows

    def start(self, request: RoundRequest, plan: AdaptationPlan, state: State) -> State:
        """Return what came, with what is this site's own: factors, or a local part behind."""
        ends = tuple(f"/{part}" for part in request.rule.personal)
        local, name, own = request.local_rank, self.settings.name, None
        if ends or local:
            own = self.cache.personal(request.run, name, plan, request.round)
        if local:
            seed = zlib.crc32(f"{request.seed}/{name}/local part".encode())
            return with_local(state, own, local, seed)
        if own is None or state_rank(plan, own) != state_rank(plan, state):
            return state
        return {key: own[key] if key.endswith(ends) else value for key, value in state.items()}

    def train(
        self,
        plan: AdaptationPlan,
        state: State,
        epochs: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        number: int,
        trained: Factors = "both",
        classes: ClassCounts | None = None,
        proximal: float = 0.0,
        optimiser: OptimiserFiles | None = None,
    ) -> tuple[State, TrainingResult, int]:
        """Train from ``state`` on the site's cases.

        Args:
            plan: The plan.
            state: Where to start.
            epochs: Passes over the slices.
            batch_size: Slices in a step.
            learning_rate: Of Adam.
            seed: Seed of the run; the order of slices follows from it, site and round.
            number: The round.
            trained: The factors of low-rank pairs that move.
            classes: Counts of all sites, to weigh labels by; by default those of each case.
            proximal: How strongly training holds to ``state``; see ``core/proximal.py``.
            optimiser: Where the optimiser is kept between rounds; by default it is not.

        Returns:
            The state afterwards, what training did, and the number of slices.

        Raises:
            ApprovalError: See ``ready``.
        """
        engine, training, slices = self.ready(plan, state, epochs, trained, classes, proximal)
        order = zlib.crc32(f"{seed}/{self.settings.name}/{number}".encode())
        set_seed(seed, self.settings.name, number)
        compiled, batches = training.on(slices, self.prefix_cache())
        adam = optimiser.before(number, state) if optimiser else None
        timed = self.clock.over(batches)
        result = compiled.run(timed, epochs, batch_size, learning_rate, order, adam=adam)
        if optimiser:
            optimiser.keep(number, compiled.adam())
        log.info("round %d: %d slices, %.1f s", number, len(slices), result.seconds)
        return engine.adapted.read(), result, len(slices)

    def ready(
        self,
        plan: AdaptationPlan,
        state: State,
        epochs: int,
        trained: Factors = "both",
        classes: ClassCounts | None = None,
        proximal: float = 0.0,
    ) -> tuple[Engine, SuffixTraining, PreparedSlices]:
        """Return the engine with ``state`` written in it, its training, and the slices.

        Raises:
            ApprovalError: The site does not agree to so many epochs, or its time is over.
        """
        require_epochs(self.settings, epochs)
        engine = self.engine(plan, state_rank(plan, state))
        slices = self.data.slices(engine.model, classes)
        self.clock.check()
        missing = self.data.labels(plan.labels).missing
        engine.adapted.train_factors(trained)
        if (key := (trained, proximal, missing)) not in engine.trainings:
            loss = marginal_loss(self.data.loss(engine.model), len(plan.labels) + 1, missing)
            precision = self.settings.precision
            made = SuffixTraining(engine.adapted, loss, precision, proximal)
            if not made.apart:  # a network has one compiled step
                engine.trainings.clear()
            engine.trainings[key] = made
        engine.adapted.write(state)
        return engine, engine.trainings[key], slices

    def optimiser_files(self, request: RoundRequest, plan: AdaptationPlan) -> OptimiserFiles | None:
        """Return where the optimiser is kept between the rounds of a run, if it is to be."""
        if request.optimiser == "fresh":
            return None
        return self.cache.optimiser(request.run, self.settings.name, plan, request.trained)

    def class_counts(self, plan: AdaptationPlan) -> tuple[ClassCounts, int]:
        """Return pixels and slices by class, and the number of training slices."""
        slices = self.data.slices(self.engine(plan, plan.rank).model)
        return class_counts(slices), len(slices)

    def moments(self, plan: AdaptationPlan, number: int, renewed: State) -> Moments:
        """Return the moments of what one normalisation of the base is given.

        Args:
            plan: The plan.
            number: The normalisation, 0 for the first of the plan.
            renewed: State arrays with the new statistics of those in front of it.

        Raises:
            MessageError: The plan has no such normalisation.
        """
        if number >= len(plan.normalisations):
            msg = f"the plan sets {len(plan.normalisations)} normalisations, not one {number + 1}"
            raise MessageError(msg)
        engine = self.engine(plan, plan.rank)
        engine.adapted.write(initial_state(plan, 0) | renewed)
        slices = self.data.slices(engine.model)
        return measure(engine.adapted, plan.normalisations[number][0], slices)

    def own_statistics(self, plan: AdaptationPlan, state: State) -> State:
        """Return ``state`` with the statistics of this site's training slices alone."""
        if not plan.normalisations:
            return state
        engine = self.engine(plan, state_rank(plan, state))
        base = engine.model.file.weights
        return recalibrate(engine.adapted, base, state, self.data.slices(engine.model))

    def device(self) -> Device:
        """Return the device that this site uses."""
        return prepare_backend(self.settings.threads, self.settings.device)

    def engine(self, plan: AdaptationPlan, rank: int) -> Engine:
        """Return the base with the plan attached, made on first use and kept by the process.

        Raises:
            ApprovalError: The base is not approved at this site.
        """
        key = (plan.base_digest, plan.digest, rank, self.settings.precision)
        if _KEPT.engine is None or _KEPT.engine_key != key:
            self.device()
            model = RunningModel(self.cache.base(plan.base_digest), self.approvals)
            _KEPT.engine = Engine(model, AdaptedNetwork(model.network, plan, rank))
            _KEPT.engine_key = key
        # The engine may have been made for another site in this process: ask this one, too.
        self.approvals.require(_KEPT.engine.model.file)
        return _KEPT.engine

    def prefix_cache(self) -> PrefixCache | None:
        """Return where the site keeps what frozen layers make of its slices, if it does."""
        if not self.settings.prefix_cache:
            return None
        return PrefixCache(self.cache.features, self.settings.prefix_cache_mib)


def dice_by_label(plan: AdaptationPlan, rows: list[Agreement]) -> tuple[list[float], list[int]]:
    """Return mean Dice and number of measured cases for each label of the plan."""
    values, counts = [], []
    kept = judged(rows)
    for label in plan.labels:
        known = [row.dice for row in kept if row.label == label]
        values.append(float(np.clip(mean(known) or 0.0, 0.0, 1.0)))
        counts.append(len(known))
    return values, counts
