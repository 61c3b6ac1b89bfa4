"""The coordinator's own images, which the gate looks at beside what the sites measure.

Measuring runs the base in this process, so it must be approved on this machine. TensorFlow is
imported only here, and only where a run names such a folder.
"""

from collections.abc import Callable
from pathlib import Path

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.dataset import load_case, open_folder
from dafne_federated.core.errors import DataError
from dafne_federated.core.low_rank import widen
from dafne_federated.core.metrics import Agreement
from dafne_federated.core.model_file import parse_model
from dafne_federated.core.paired_changes import Changes, paired_changes
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.state import State, initial_state, state_rank
from dafne_federated.server.continuation import continuation, start_state


def reference_changes(folder: RunFolder) -> Callable[[int], tuple[Changes, ...]]:
    """Return what measures the state after a round in the reference folder, by label.

    The changes are those from what the run started from and, if that is a release, from the base.

    Its masks must have the names of the model's labels; all of its persons accept.
    """
    kept: dict[int, tuple[Changes, ...]] = {}

    def after(number: int) -> tuple[Changes, ...]:
        if number not in kept:
            kept[number] = _measure(folder, folder.state_after(number))
        return kept[number]

    return after


def _measure(folder: RunFolder, state: State) -> tuple[Changes, ...]:
    """Return how the Dice of each label changes to ``state``; see ``reference_changes``.

    Raises:
        ApprovalError: The base is not approved on this machine.
        DataError: The folder or a case in it cannot be read, or no mask is of a label of the model.
    """
    from dafne_federated.core.adapters import AdaptedNetwork
    from dafne_federated.core.backend import prepare_backend
    from dafne_federated.core.evaluation import evaluate_case
    from dafne_federated.core.model_runtime import RunningModel

    settings, plan = folder.info().settings, folder.plan()
    prepare_backend(settings.threads, settings.device)
    model = RunningModel(parse_model(folder.base_bytes()), Approvals())
    images = open_folder(Path(settings.reference))
    rows: list[list[Agreement]] = []
    record = continuation(folder)
    before = [initial_state(plan, 0)]
    if record is not None and record.from_release:
        before.insert(0, start_state(folder, record))
    states = (*before, state)  # whose ranks may differ
    rank = max(state_rank(plan, one) for one in states)
    adapted = AdaptedNetwork(model.network, plan, rank)
    for measured in states:
        adapted.write(_at_rank(plan, measured, rank))
        found: list[Agreement] = []
        for ref in images.cases:
            case = load_case(ref, images.labels)
            found += evaluate_case(model, case, adapted.predict, distances=False)
        if not found:
            labels = ", ".join(plan.labels)
            msg = f"reference {settings.reference!r}: expected masks of {labels}, got none of them"
            raise DataError(msg)
        rows.append(found)
    persons = {ref.name: ref.person for ref in images.cases}
    everybody = frozenset(persons.values())
    return tuple(paired_changes(old, rows[-1], persons, everybody)[1] for old in rows[:-1])


def _at_rank(plan: AdaptationPlan, state: State, rank: int) -> State:
    """Return the same state with pairs of at least this rank; zeros change nothing."""
    wide = dict(state)
    for target in plan.targets:
        if target.low_rank:
            a, b = f"{target.key}/a", f"{target.key}/b"
            wide[a], wide[b] = widen((state[a], state[b]), rank)
    return wide
