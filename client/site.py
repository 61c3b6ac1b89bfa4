"""One hospital: its data, its consent, its training and its evaluation.

Everything that a message can ask of a site happens here; ``app.py`` only carries it.
"""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dafne_federated.client.inbox import Inbox
from dafne_federated.client.site_cache import SiteCache
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.backend import Device, prepare_backend, set_seed
from dafne_federated.core.batch_statistics import measure, recalibrate
from dafne_federated.core.class_weights import ClassCounts, class_counts, reweighted
from dafne_federated.core.dataset import CaseRef, load_case, open_folder
from dafne_federated.core.errors import ApprovalError, DataError, MessageError
from dafne_federated.core.evaluation import evaluate_case
from dafne_federated.core.metrics import Agreement, judged, mean
from dafne_federated.core.model_runtime import Loss, RunningModel
from dafne_federated.core.moments import Moments
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.prefix_cache import PrefixCache
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.state import State, initial_state, state_rank
from dafne_federated.core.strategy_table import Factors, RoundRule
from dafne_federated.core.suffix_training import SuffixTraining
from dafne_federated.core.training import TrainingResult
from dafne_federated.core.volumes import Case

log = logging.getLogger(__name__)


@dataclass
class Engine:
    """A base with a plan attached, ready to train; expensive to make, so kept."""

    model: RunningModel
    adapted: AdaptedNetwork
    training: SuffixTraining | None = None
    trained: Factors = "both"


@dataclass
class _Kept:
    """What this process keeps between messages: one engine, and slices by site."""

    engine_key: tuple[str, str, int, str] | None = None
    engine: Engine | None = None
    slices: dict[tuple[str, str, ClassCounts | None], PreparedSlices] = field(default_factory=dict)
    bias_fields: dict[str, BiasFieldCache] = field(default_factory=dict)


_KEPT = _Kept()


class Site:
    """What one site does.

    Args:
        settings: The site.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self.cache = SiteCache(settings.cache)
        self.approvals = Approvals(settings.approvals)
        self.inbox = Inbox(settings.inbox) if settings.inbox else None

    def consider(self, run: str, plan: AdaptationPlan) -> None:
        """Decide whether this site takes part in a run, and remember its plan.

        Raises:
            ApprovalError: The base is not approved here, there are too few cases, or the plan
                does not allow the site's rank.
        """
        self.require_consent(plan.base_digest)
        pairs = any(target.low_rank for target in plan.targets)
        if pairs and (self.settings.rank or 0) > plan.max_rank:
            msg = f"this site trains at rank {self.settings.rank}, the plan allows {plan.max_rank}"
            raise ApprovalError(msg)
        self.cache.keep_plan(run, plan)

    def wants_to_see(self, base_digest: str) -> bool:
        """Return whether a base that nobody approved shall come to be looked at, as bytes."""
        if self.inbox is None or self.approvals.allows(base_digest):
            return False
        return not self.inbox.has(base_digest)

    def require_consent(self, base_digest: str) -> None:
        """Refuse what this site's people did not agree to; asked again with every message.

        Raises:
            ApprovalError: The base is not approved here, or there are too few cases.
        """
        if not self.approvals.allows(base_digest):
            waits = self.inbox is not None and self.inbox.has(base_digest)
            words = "waits for approval" if waits else "is not approved"
            msg = f"base model {base_digest[:16]} {words} at this site"
            raise ApprovalError(msg)
        if len(self.settings.training) < self.settings.min_cases:
            msg = f"this site takes part with at least {self.settings.min_cases} training cases"
            raise ApprovalError(msg)

    def agreed_plan(self, run: str, digest: str, base_digest: str) -> AdaptationPlan:
        """Return the plan that this site agreed to for a run.

        Raises:
            MessageError: It never did, or the message names another base than the plan.
            ApprovalError: The site does not agree any more.
        """
        plan = self.cache.plan(run, digest)
        if plan is None:
            msg = f"plan {digest[:16]} was never offered to this site in this run"
            raise MessageError(msg)
        if plan.base_digest != base_digest:
            msg = f"the plan belongs to base {plan.base_digest[:16]}, not to {base_digest[:16]}"
            raise MessageError(msg)
        self.require_consent(base_digest)
        return plan

    def evaluate(self, plan: AdaptationPlan, state: State) -> list[Agreement]:
        """Return the Dice of ``state`` on the validation cases, in the images' own geometry."""
        engine = self.engine(plan, state_rank(plan, state))
        engine.adapted.write(state)
        rows = []
        for case in self._cases(self.settings.validation):
            rows += evaluate_case(
                engine.model,
                case,
                engine.adapted.predict,
                self.settings.classification,
                self.bias_fields(),
                distances=False,
            )
        return rows

    def start(
        self, run: str, plan: AdaptationPlan, state: State, number: int, rule: RoundRule
    ) -> State:
        """Return what came, with the factors that are this site's own where it has some."""
        ends = tuple(f"/{part}" for part in rule.personal)
        own = self.cache.personal(run, self.settings.name, plan, number) if ends else None
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

        Returns:
            The state afterwards, what training did, and the number of slices.

        Raises:
            ApprovalError: The site does not agree to so many epochs.
        """
        if epochs > self.settings.max_epochs:
            msg = f"this site trains at most {self.settings.max_epochs} epochs a round"
            raise ApprovalError(msg)
        engine = self.engine(plan, state_rank(plan, state))
        slices = self._slices(engine, classes)
        if engine.training is None or engine.trained != trained:
            precision = self.settings.precision
            engine.adapted.train_factors(trained)
            engine.training = SuffixTraining(engine.adapted, self._loss(engine), precision)
            engine.trained = trained
        engine.adapted.write(state)
        order = zlib.crc32(f"{seed}/{self.settings.name}/{number}".encode())
        set_seed(seed, self.settings.name, number)
        result = engine.training.run(
            slices, epochs, batch_size, learning_rate, order, cache=self.prefix_cache()
        )
        log.info("round %d: %d slices, %.1f s", number, len(slices), result.seconds)
        return engine.adapted.read(), result, len(slices)

    def class_counts(self, plan: AdaptationPlan) -> tuple[ClassCounts, int]:
        """Return pixels and slices by class, and the number of training slices."""
        slices = self._slices(self.engine(plan, plan.rank))
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
        return measure(engine.adapted, plan.normalisations[number][0], self._slices(engine))

    def own_statistics(self, plan: AdaptationPlan, state: State) -> State:
        """Return ``state`` with the statistics of this site's training slices alone."""
        if not plan.normalisations:
            return state
        engine = self.engine(plan, state_rank(plan, state))
        base = engine.model.file.weights
        return recalibrate(engine.adapted, base, state, self._slices(engine))

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

    def bias_fields(self) -> BiasFieldCache:
        """Return the site's kept bias fields."""
        folder = self.settings.bias_fields or self.settings.cache / "bias-fields"
        return _KEPT.bias_fields.setdefault(str(folder), BiasFieldCache(folder))

    def prefix_cache(self) -> PrefixCache | None:
        """Return where the site keeps what frozen layers make of its slices, if it does."""
        if not self.settings.prefix_cache:
            return None
        return PrefixCache(self.cache.features, self.settings.prefix_cache_mib)

    def _loss(self, engine: Engine) -> Loss:
        """Return the base's loss; where all slices came from disk it is still to be captured."""
        cases = self._cases(self.settings.training)
        while engine.model.loss is None:
            engine.model.prepare(next(cases), self.settings.classification, self.bias_fields())
        return engine.model.loss

    def _slices(self, engine: Engine, classes: ClassCounts | None = None) -> PreparedSlices:
        names = "/".join(self.settings.training)
        key = (f"{self.settings.cache}/{names}", engine.model.file.digest, classes)
        if key not in _KEPT.slices:
            _KEPT.slices.pop((*key[:2], None), None)  # the same images with other weights
            cases = self._cases(self.settings.training)
            parts = [part for case in cases if (part := self._prepared(engine, case))]
            if classes:
                parts = [reweighted(part, classes) for part in parts]
            if not parts:
                msg = "no slice of the training cases can be trained on"
                raise DataError(msg)
            _KEPT.slices[key] = concatenate(parts)
        return _KEPT.slices[key]

    def _prepared(self, engine: Engine, case: Case) -> PreparedSlices | None:
        classification = self.settings.classification
        key = self.cache.slices_key(case, engine.model.file, classification)
        slices = self.cache.slices(key)
        if slices is None:
            slices = engine.model.prepare(case, classification, self.bias_fields())
            if slices is not None:
                self.cache.keep_slices(key, slices)
        return slices

    def _cases(self, names: tuple[str, ...]) -> Iterator[Case]:
        folder = open_folder(self.settings.data)
        known: dict[str, CaseRef] = {ref.name: ref for ref in folder.cases}
        for name in names:
            if name not in known:
                msg = f"case {name!r} is not in the site's folder"
                raise DataError(msg)
            yield load_case(known[name], folder.labels)


def dice_by_label(plan: AdaptationPlan, rows: list[Agreement]) -> tuple[list[float], list[int]]:
    """Return mean Dice and number of measured cases for each label of the plan."""
    values, counts = [], []
    kept = judged(rows)
    for label in plan.labels:
        known = [row.dice for row in kept if row.label == label]
        values.append(float(np.clip(mean(known) or 0.0, 0.0, 1.0)))
        counts.append(len(known))
    return values, counts
