"""How a state compares with others in the site's validation persons: what the gate decides by.

The Dice of each person stay here; what leaves is how many persons there were, and sums.
"""

import json
from collections.abc import Mapping

from flwr.app import RecordDict
from pydantic import TypeAdapter, ValidationError

from dafne_federated.client.site import Site
from dafne_federated.core.dataset import CaseRef, open_folder
from dafne_federated.core.files import arrays_digest, sha256, write_atomic
from dafne_federated.core.local_part import silenced, with_local
from dafne_federated.core.metrics import Agreement
from dafne_federated.core.paired_changes import change_fields, paired_changes
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, initial_state, state_rank
from dafne_federated.core.versions import software_version
from dafne_federated.core.wire import RoundRequest
from dafne_federated.core.wire_arrays import take_state

_ROWS = TypeAdapter(list[Agreement])


def first_state(plan: AdaptationPlan, request: RoundRequest, content: RecordDict) -> State | None:
    """Return the state that the run started from, as it is measured, if it came along.

    Raises:
        MessageError: It should have, and did not.
        StateError: It does not fit the plan.
    """
    if not request.first:
        return None
    arrays = content.array_records
    alone = RecordDict({"arrays": arrays["first"]} if "first" in arrays else {})
    first = take_state(alone, plan, request.wire)
    return silenced(with_local(first, None, request.local_rank, 0), request.local_rank)


def compared_with_start(
    site: Site, plan: AdaptationPlan, state: State, first: State | None = None
) -> tuple[list[Agreement], dict[str, object]]:
    """Return the agreement of ``state`` on the validation cases, and the sums that may leave.

    What is compared with, the base and ``first`` before it, is measured once, where it is not
    ``state`` itself, and kept in the site's cache: so a site can compare whenever it joins.

    Args:
        site: The site.
        plan: The plan of ``state``.
        state: What is measured.
        first: The state that the run started from, where that is not the base, unchanged.
    """
    cases = {ref.name: ref for ref in open_folder(site.settings.data).cases}
    states = (None,) if first is None else (first, None)
    before = [_before(site, cases, plan, state, one) for one in states]
    rows = site.evaluate(plan, state)
    here = {name: cases[name].person for name in site.settings.validation}
    parts = [paired_changes(rows if old is None else old, rows, here) for old in before]
    return rows, change_fields(plan.labels, *parts)


def _before(
    site: Site,
    cases: Mapping[str, CaseRef],
    plan: AdaptationPlan,
    state: State,
    first: State | None,
) -> list[Agreement] | None:
    """Return the agreement of ``first``, or of the base; None if that is ``state`` itself."""
    if first is None:
        first, digest = initial_state(plan, 0, state_rank(plan, state)), "base"
        if not any(value.any() for key, value in state.items() if not key.endswith("/a")):
            return None
    elif (digest := arrays_digest(first)) == arrays_digest(state):
        return None
    path = site.cache.folder / "base-dice" / f"{_key(site, cases, plan, digest)}.json"
    try:
        return _ROWS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        rows = site.evaluate(plan, first)
        write_atomic(path, _ROWS.dump_json(rows), private=True)
        return rows


def _key(site: Site, cases: Mapping[str, CaseRef], plan: AdaptationPlan, first: str) -> str:
    """Return a digest of all that the Dice of what is compared with depend on."""
    settings = site.settings
    files = [
        sha256(path.read_bytes())
        for name in settings.validation
        for path in (cases[name].image, cases[name].label)
        if path is not None
    ]
    here = site.data.labels(plan.labels)
    parts = [
        *(software_version(), plan.base_digest, first, settings.classification, site.device().name),
        *(list(settings.validation), files, here.names, here.missing),
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode())
