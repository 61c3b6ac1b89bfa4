"""A round in which a site hides each of its persons: consent, ledger, training."""

import json
import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dafne_federated.client.privacy_ledger import PrivacyLedger, Release
from dafne_federated.client.site import Site
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.backend import set_seed
from dafne_federated.core.dataset import open_folder
from dafne_federated.core.errors import ApprovalError, SettingsError, StateError
from dafne_federated.core.files import arrays_digest
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.privacy_accountant import NEIGHBOURS, UNIT, Mechanism
from dafne_federated.core.private_training import PrivateTraining
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.state import State, load_state, save_state
from dafne_federated.core.versions import software_version
from dafne_federated.core.wire import RoundRequest

log = logging.getLogger(__name__)

# Raise when private training makes other bits of the same question.
_VERSION = 2


@dataclass(frozen=True)
class PrivateAnswer:
    """What a private round gives; all of it may leave the site.

    Attributes:
        state: The state afterwards.
        epsilon: What the run cost each person so far.
        delta: Of that epsilon.
        steps: Steps of this round.
        seconds: Wall time of training; 0 if the answer was made before.
    """

    state: State
    epsilon: float
    delta: float
    steps: int
    seconds: float


def require_noise(settings: SiteSettings, mechanism: Mechanism | None) -> None:
    """Refuse a round with less noise than the site wants.

    Raises:
        ApprovalError: In words.
    """
    if mechanism is None and settings.min_noise:
        msg = (
            f"this site trains only where each person is hidden with noise of at least "
            f"{settings.min_noise:g}; take privacy 'person'"
        )
        raise ApprovalError(msg)
    if mechanism is not None and mechanism.noise < settings.min_noise:
        msg = (
            f"this site wants noise of at least {settings.min_noise:g}, the run asks for "
            f"{mechanism.noise:g}"
        )
        raise ApprovalError(msg)


def train_privately(
    site: Site, plan: AdaptationPlan, state: State, request: RoundRequest, mechanism: Mechanism
) -> PrivateAnswer:
    """Train from ``state`` so that the answer hides each person of the site.

    The same question about the same data gives the same bits and costs nothing more: the name
    of an answer follows from all that it depends on, the data included, so that the noise of
    one is never that of another. Run names are not among it: two runs that ask the very same
    get the very same.

    Args:
        site: The site.
        plan: The plan that it agreed to.
        state: Where to start, with the site's own factors.
        request: What is asked.
        mechanism: Its noise, clip and rate.

    Raises:
        ApprovalError: The site does not agree, it would pass its bound, or something that the
            noise does not cover would go into the answer.
    """
    settings = site.settings
    require_noise(settings, mechanism)
    _require_cover(site, plan, request)
    engine, training, slices = site.ready(plan, state, request.epochs, request.trained)
    persons = site.data.persons(engine.model)
    if settings.delta * len(set(persons)) >= 1:
        msg = f"the site's delta {settings.delta:g} must be below 1 / persons; it must lower it"
        raise ApprovalError(msg)
    ledger = PrivacyLedger(site.cache.privacy, marker=settings.privacy_marker)
    content = _content(site, plan, state, request, slices, persons)
    name, steps = ledger.name(content), mechanism.steps(request.epochs)
    release = Release(
        name=name,
        run=request.run,
        round=request.round,
        base_digest=plan.base_digest,
        noise=mechanism.noise,
        rate=mechanism.rate,
        steps=steps,
    )
    try:
        own, total = ledger.spend(release, settings.delta, settings.max_epsilon)
    except SettingsError as error:  # the accountant is not installed
        raise ApprovalError(str(error)) from None
    log.info(
        "round %d: epsilon %.3g in this run, %.3g in all runs, delta %g, unit one %s: %s",
        *(request.round, own, total, settings.delta, UNIT, NEIGHBOURS),
    )
    if (kept := _kept(site, name)) is not None:
        return PrivateAnswer(kept, own, settings.delta, steps, 0.0)
    set_seed(request.seed, settings.name, request.round)
    if engine.private is None or engine.private.training is not training:
        engine.private = PrivateTraining(training)
    result = engine.private.run(
        slices,
        persons,
        mechanism,
        request.epochs,
        request.batch_size,
        request.learning_rate,
        ledger.seed(content),
        site.prefix_cache(),
    )
    answer = engine.adapted.read()
    _keep(site, plan, name, answer)
    return PrivateAnswer(answer, own, settings.delta, steps, result.seconds)


def _require_cover(site: Site, plan: AdaptationPlan, request: RoundRequest) -> None:
    """Refuse what carries something of a person past the noise."""
    if plan.normalisations or request.classes:
        msg = (
            "statistics or class frequencies were pooled over all persons, which the noise does "
            "not cover; take statistics 'base' and class-weights 'case'"
        )
        raise ApprovalError(msg)
    if request.optimiser != "fresh" or request.proximal:
        msg = "private steps start with a fresh optimiser and have no proximal term"
        raise ApprovalError(msg)
    settings = site.settings
    if settings.annotated is None and site.data.labels(plan.labels).missing:
        msg = (
            "which labels a site lacks may follow from one person's masks, and it leaves without "
            "noise; the site must say with 'annotated' which labels it has"
        )
        raise ApprovalError(msg)
    person = {ref.name: ref.person for ref in open_folder(settings.data).cases}
    training = {person.get(name) for name in settings.training}
    if not training.isdisjoint(person.get(name) for name in settings.validation):
        msg = (
            "a person of the site is among training and validation cases, and the Dice of "
            "validation cases leaves without noise; the site must take one of both out"
        )
        raise ApprovalError(msg)


def _content(
    site: Site,
    plan: AdaptationPlan,
    state: State,
    request: RoundRequest,
    slices: PreparedSlices,
    persons: tuple[str, ...],
) -> str:
    """Return as text everything that the bits of an answer follow from, but the site's key."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "images": slices.images,
        "labels": slices.labels,
        "weights": slices.weights,
    }
    settings = site.settings
    question = request.model_dump(
        mode="json", exclude={"run", "plan_digest", "wire", "sent", "class_pixels", "class_slices"}
    )
    here = [
        *(settings.name, settings.precision, settings.prefix_cache, site.device().name),
        list(site.data.labels(plan.labels).missing),  # they change the loss
    ]
    # Names of layers differ from process to process, and nothing depends on them.
    planned = plan.model_dump(mode="json", exclude={"targets": {"__all__": {"layer"}}})
    digests = [arrays_digest(state), arrays_digest(arrays)]
    parts = [_VERSION, software_version(), question, here, planned, digests, persons]
    return json.dumps(parts, sort_keys=True)


def _kept(site: Site, name: str) -> State | None:
    """Return the answer of this name if it is the last one; it holds noise already."""
    try:
        return load_state(site.cache.privacy / f"answer-{name}.npz")[1]
    except StateError:
        return None


def _keep(site: Site, plan: AdaptationPlan, name: str, state: State) -> None:
    """Keep the last answer, so that the same question does not depend on the same machine."""
    path = site.cache.privacy / f"answer-{name}.npz"
    save_state(path, plan, state)
    for old in site.cache.privacy.glob("answer-*.npz"):
        if old != path:
            old.unlink(missing_ok=True)
