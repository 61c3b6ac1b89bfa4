"""The stages after the last round: each site alone, the test, the check of the release.

Each leaves a file behind when it is done, so a run that is opened again goes on with the next.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dafne_federated.client.site import Site
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.adapters import AdaptedNetwork
from dafne_federated.core.approvals import Approvals
from dafne_federated.core.dataset import CaseRef, DataFolder, load_case, open_folder
from dafne_federated.core.errors import RunError
from dafne_federated.core.evaluation import known_masks, label_map, looked_at
from dafne_federated.core.metrics import Agreement, agreement, mean
from dafne_federated.core.model_file import read_model
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.rank_cut import at_rank
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import State, load_state, save_state, state_rank
from dafne_federated.core.strategy_table import round_rule
from dafne_federated.core.volumes import Case, orientation
from dafne_federated.server.rounds import first_state
from dafne_federated.simulations.comparison import persons_to_show
from dafne_federated.simulations.local_only import train_alone
from dafne_federated.simulations.preparation import Prepared
from dafne_federated.simulations.progress import Stages
from dafne_federated.simulations.release_check import (
    ReleaseCheck,
    load_release_check,
    save_release_check,
)
from dafne_federated.simulations.test_results import (
    Overlay,
    TestRow,
    save_overlays,
    save_test_rows,
)


def measure(
    folder: RunFolder, prepared: Prepared, sites: Mapping[str, SiteSettings], stages: Stages
) -> None:
    """Do what is left to do after the last round; what is on disk already stays as it is.

    Raises:
        DafneFederatedError: A file of the run or of the data is missing or damaged.
    """
    if not (folder.path / "test.json").exists():
        alone = _alone(folder, sites, stages) if prepared.local_only else {}
        _test(folder, prepared, sites, alone, stages)
    if folder.result().released and load_release_check(folder) is None:
        images = open_folder(prepared.data)
        names = [name for cases in prepared.test.values() for name in cases]
        names += [name for site in sites.values() for name in site.training]
        _check_release(folder, images, _refs(images, names))


def measure_case(
    model: RunningModel,
    adapted: AdaptedNetwork,
    case: Case,
    site: str,
    arms: Mapping[str, Sequence[State]],
    cache: BiasFieldCache,
    classification: str = "",
) -> tuple[list[TestRow], Overlay]:
    """Return how each arm agrees with the truth of a case, and a slice to look at.

    Args:
        model: The base.
        adapted: Its network with the plan of all states.
        case: Image and masks.
        site: Site of the person.
        arms: States by arm; of several the mean is taken.
        cache: Keeps bias fields.
        classification: The class as Dafne names it.
    """
    truth = known_masks(model, case)
    marked = np.sum([mask.sum(axis=(0, 1)) for mask in truth.values()], axis=0)
    index = int(np.argmax(marked))
    rows: list[TestRow] = []
    predictions: dict[str, NDArray[np.uint8]] = {}
    for arm, states in arms.items():
        measured: list[list[Agreement]] = []
        for state in states:
            adapted.write(state)
            found = model.apply(case, adapted.predict, classification, cache)
            found = looked_at(case, truth, found)
            predictions[arm] = label_map(model, found, index)
            measured.append(agreement(case.name, truth, found, case.spacing))
        for same in zip(*measured, strict=True):
            rows.append(
                TestRow(
                    arm=arm,
                    site=site,
                    person=case.person,
                    case=case.name,
                    label=same[0].label,
                    dice=mean([row.dice for row in same]),
                    hd95=mean([row.hd95 for row in same]),
                    volume_error=mean([row.volume_error for row in same]),
                )
            )
    overlay = Overlay(
        site=site,
        person=case.person,
        case=case.name,
        slice_index=index,
        image=case.image[..., index],
        truth=label_map(model, truth, index),
        predictions=predictions,
        spacing=np.array(case.spacing[:2]),
        orientation="" if case.affine is None else orientation(case.affine)[:2],
    )
    return rows, overlay


def personal_states(folder: RunFolder, sites: Mapping[str, SiteSettings]) -> dict[str, State]:
    """Return each site's own last state, with a strategy that leaves factors at the sites."""
    info, plan = folder.info(), folder.plan()
    if not round_rule(info.settings.strategy, 1).personal:
        return {}
    after = info.settings.rounds + 1
    kept = {n: Site(s).cache.personal(info.run, n, plan, after) for n, s in sites.items()}
    return {name: state for name, state in kept.items() if state is not None}


def _alone(
    folder: RunFolder, sites: Mapping[str, SiteSettings], stages: Stages
) -> dict[str, State]:
    info, plan = folder.info(), folder.plan()
    start, rounds = first_state(info, plan), info.settings.rounds
    alone: dict[str, State] = {}
    with stages.stage("Each site alone", len(sites) * rounds) as advance:
        for name, settings in sites.items():
            path = folder.path / "local" / f"{name}.npz"
            if not path.exists():
                state = train_alone(Site(settings), plan, start, info.settings, advance)
                save_state(path, plan, state)
            kept_plan, alone[name] = load_state(path)
            if kept_plan != plan:
                msg = f"{path}: expected a state of this run, got one of another plan"
                raise RunError(msg)
    return alone


def _test(
    folder: RunFolder,
    prepared: Prepared,
    sites: Mapping[str, SiteSettings],
    alone: Mapping[str, State],
    stages: Stages,
) -> None:
    """Measure base, local and federated states on persons that nobody trained on."""
    info, plan, result = folder.info(), folder.plan(), folder.result()
    start = first_state(info, plan)
    final = folder.state_after(result.round or info.settings.rounds)
    images = open_folder(prepared.data)
    rows: list[TestRow] = []
    overlays: list[Overlay] = []
    total = sum(len(names) for names in prepared.test.values())
    any_site = Site(next(iter(sites.values())))
    own = personal_states(folder, sites)
    with stages.stage("Testing on unseen persons", total) as advance:
        for name, cases in prepared.test.items():
            # At a site that took no part, each local model is a guest: their mean is shown.
            local = [alone[name]] if name in alone else list(alone.values())
            together = [own[name]] if name in own else list(own.values()) or [final]
            arms: dict[str, list[State]] = {"base": [start], "federated": together}
            arms |= {"local only": local} if local else {}
            bench = Site(sites[name]) if name in sites else any_site
            for ref in _refs(images, cases):
                found, overlay = _test_case(bench, plan, ref, images, name, arms)
                rows += found
                overlays.append(overlay)
                advance(ref.name)
    shown = persons_to_show(rows)
    save_overlays(folder, [o for o in overlays if (o.site, o.person) in shown])
    save_test_rows(folder, rows)  # last: this file says that the test is done


def _refs(images: DataFolder, names: Iterable[str]) -> list[CaseRef]:
    known = {ref.name: ref for ref in images.cases}
    wanted = list(names)
    missing = [name for name in wanted if name not in known]
    if missing:
        msg = f"case {missing[0]!r}: expected it in the data folder as when the run began, gone"
        raise RunError(msg)
    return [known[name] for name in wanted]


def _test_case(
    bench: Site,
    plan: AdaptationPlan,
    ref: CaseRef,
    images: DataFolder,
    site: str,
    arms: Mapping[str, Sequence[State]],
) -> tuple[list[TestRow], Overlay]:
    case = load_case(ref, images.labels)
    rank = max(state_rank(plan, state) for states in arms.values() for state in states)
    engine = bench.engine(plan, rank)
    same = {arm: [at_rank(plan, s, rank, seed=0).state for s in arms[arm]] for arm in arms}
    return measure_case(engine.model, engine.adapted, case, site, same, bench.data.bias_fields())


def _check_release(folder: RunFolder, images: DataFolder, cases: Iterable[CaseRef]) -> None:
    for ref in cases:
        difference = release_difference(folder, ref, images.labels)
        if difference is not None:
            save_release_check(folder, ReleaseCheck(case=ref.name, difference=difference))
            return


def release_difference(folder: RunFolder, case: CaseRef, labels: Mapping[int, str]) -> float | None:
    """Return the largest difference between the released file and the adapted network.

    Both networks see the first prepared slices of one case; the figure is the largest
    difference of any probability, or None if no slice of the case can be prepared.
    """
    info, plan, result = folder.info(), folder.plan(), folder.result()
    approvals = Approvals(folder.path / "approved-models.json")
    released_file = read_model(folder.release / result.release)
    approvals.add(released_file, "released by this simulation")
    released = RunningModel(released_file, approvals)
    slices = released.prepare(load_case(case, labels))
    if slices is None:
        return None
    model = RunningModel(read_model(folder.base), approvals)
    state = folder.state_after(result.round or info.settings.rounds)
    adapted = AdaptedNetwork(model.network, plan, state_rank(plan, state))
    adapted.write(state)
    inputs = slices.inputs()[:4]
    after = np.asarray(released.network.predict_on_batch(inputs))
    return float(np.abs(after - adapted.predict(inputs)).max())
