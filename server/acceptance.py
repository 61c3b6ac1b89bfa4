"""The acceptance gate: which round is the best, and whether it may be released.

Some validation persons of each site choose the round, the others accept it or not; who is who is
in ``core/paired_changes.py``. A reference folder of the coordinator's, if there is one, is one more
place whose persons all accept.

After a start from an earlier release a round has to pass twice: against that release, and against
the base. Each release may lose up to the margin against the one before; against the base all of
them together may not.
"""

from collections.abc import Callable, Mapping, Sequence

from dafne_federated.core.gate_decision import GateDecision, GateLine
from dafne_federated.core.paired_changes import Changes, PairedChange, mean_change, together
from dafne_federated.core.run_folder import RoundLine
from dafne_federated.core.settings import RunSettings

REFERENCE = "(reference folder)"  # no site can have this name

# With fewer persons an interval says little beside the number of labels and sites that are looked
# at: with 3 its half width is 1.7 standard deviations, with 5 it is 1.0 (at confidence 0.95).
INTERVAL_FROM = 5

# Who accepts must not become who chooses: only so many rounds are shown to them.
_LOOKS = 3


def decide(
    rounds: Sequence[RoundLine],
    settings: RunSettings,
    reference: Callable[[int], Sequence[Changes]] | None = None,
    from_release: bool = False,
) -> tuple[int | None, GateDecision]:
    """Return the round to release, or None, and the decision that was taken last.

    The best round by those who choose is shown first to those who accept; if they do not accept
    it, the next best.

    Args:
        rounds: All lines; the last one evaluates the final state.
        settings: Those of the run.
        reference: Gives the changes in the reference folder with the state after a round: from
            the start and, if that is a release, from the base.
        from_release: Whether the run started from an earlier release.
    """
    looked: list[int] = []
    reasons: list[str] = []
    decision = GateDecision(accepted=False, reason="", few=True, persons=0, change=None, lines=())
    for line in _best_first(rounds):
        number = line.round - 1
        if missing := _missing(line, rounds):
            reasons.append(f"round {number}: {missing}")
            continue
        looked.append(number)
        decision = _judged(line, settings, reference, from_release)
        if decision.accepted:
            return number, decision.model_copy(update={"looked_at": tuple(looked)})
        reasons.append(f"round {number}: {decision.reason}")
        if decision.few or len(looked) == _LOOKS:
            break
    reason = "; ".join(reasons) or "no round was judged"
    return None, decision.model_copy(update={"reason": reason, "looked_at": tuple(looked)})


def accept(
    changes: Mapping[str, Changes],
    settings: RunSettings,
    others: Mapping[str, Changes] | None = None,
) -> GateDecision:
    """Decide whether a state may be released.

    It may if the mean Dice rises and no label falls by more than ``margin``, neither at a site
    nor over all of them. From 5 persons on a label falls where the lower end of the interval of
    its paired differences is below the margin, so that a fall that large is excluded with the
    settings' confidence; with fewer, where their mean is. One or two persons say little of a
    label: where fewer than ``min-persons`` accept with it at a site, those who choose are looked at
    beside them for a fall there. In the mean over all they do not count.

    Args:
        changes: In the persons who accept, by site and label.
        settings: Margin, confidence and the least number of persons of the run.
        others: In the persons who choose.
    """
    lines, persons = _lines(changes, others or {}, settings), _persons(changes)
    change, few = mean_change({n: c for n, c in changes.items() if c}), False
    falls = [line for line in lines if line.falls]
    falls.sort(key=lambda line: not line.site)  # where it is comes before that it is
    if persons < settings.min_persons or change is None:
        few = True
        reason = (
            f"too few validation persons to decide: expected min-persons {settings.min_persons} "
            f"who accept, got {persons}; a reference folder can decide"
        )
    elif falls:
        reason = _fall(falls[0], settings)
        if len(falls) > 1:
            reason += f", and {len(falls) - 1} more"
    elif change <= 0:
        reason = f"the mean Dice of those who accept does not rise ({change:+.3f})"
    else:
        reason = ""
    return GateDecision(
        accepted=not reason,
        reason=reason,
        few=few,
        persons=persons,
        change=change,
        lines=tuple(lines),
    )


def _judged(
    line: RoundLine,
    settings: RunSettings,
    reference: Callable[[int], Sequence[Changes]] | None,
    from_release: bool,
) -> GateDecision:
    """Return whether the state that a line measured may be released, by all that it has to pass."""
    sites, number = sorted(line.sites.items()), line.round - 1

    def against(
        state: int, changes: Mapping[str, Changes], others: Mapping[str, Changes]
    ) -> GateDecision:
        found = accept(changes, settings, others)
        if reference is not None and (found.accepted or found.few):
            found = accept({**changes, REFERENCE: reference(number)[state]}, settings, others)
        return found

    decision = against(0, {n: s.accept for n, s in sites}, {n: s.choose for n, s in sites})
    if not from_release:
        return decision
    decision = decision.model_copy(update={"against": "start"})
    if not decision.accepted:
        return decision
    base = against(1, {n: s.accept_base for n, s in sites}, {n: s.choose_base for n, s in sites})
    reason = f"against the base: {base.reason}" if base.reason else ""
    told = {"accepted": base.accepted, "reason": reason, "few": base.few, "base": base}
    return decision.model_copy(update=told)


def _best_first(rounds: Sequence[RoundLine]) -> list[RoundLine]:
    """Return the lines that measured a whole state, the best by those who choose first.

    Where nobody chooses, the last state is the first to be looked at.
    """
    whole = [line for line in rounds[1:] if line.whole]  # else some sites measured a cut of it
    gains = {
        line.round: mean_change({n: s.choose for n, s in line.sites.items() if s.choose})
        for line in whole
    }
    if all(gain is None for gain in gains.values()):
        return whole[::-1]
    return sorted(whole, key=lambda line: (-(gains[line.round] or 0.0), line.round))


def _missing(line: RoundLine, rounds: Sequence[RoundLine]) -> str:
    """Return what those who accept measured in another round only, in words; or nothing."""
    for other in rounds:
        for name, site in sorted(other.sites.items()):
            here = line.sites[name].accept if name in line.sites else {}
            for label in sorted(site.accept.keys() - here.keys()):
                return (
                    f"{label} of {name} was measured in round {other.round} but not of this state"
                )
    return ""


def _lines(
    changes: Mapping[str, Changes], others: Mapping[str, Changes], settings: RunSettings
) -> list[GateLine]:
    sites = {
        site: _looked_at(changes.get(site, {}), others.get(site, {}), settings.min_persons)
        for site in sorted(changes.keys() | others.keys())
    }
    cells = [
        ("", label, together(_over_all(label, changes, sites)))
        for label in sorted({label for own in sites.values() for label in own})
    ]
    for site, own in sites.items():
        cells += [(site, label, own[label]) for label in sorted(own)]
    return [_line(site, label, cell, settings) for site, label, cell in cells]


def _looked_at(accepting: Changes, choosing: Changes, least: int) -> Changes:
    """Return who is looked at for a fall at a site, by label."""
    found = {**choosing, **accepting}
    for label in accepting.keys() & choosing.keys():
        if accepting[label].persons < least:
            found[label] = together((accepting[label], choosing[label]))
    return found


def _over_all(
    label: str, changes: Mapping[str, Changes], sites: Mapping[str, Changes]
) -> list[PairedChange]:
    """Return those who accept, and of sites where none has the label those who choose."""
    found = [changes.get(site, {}).get(label) or own.get(label) for site, own in sites.items()]
    return [cell for cell in found if cell is not None]


def _line(site: str, label: str, cell: PairedChange, settings: RunSettings) -> GateLine:
    lower = cell.lower(settings.confidence) if cell.persons >= INTERVAL_FROM else None
    worst = cell.mean if lower is None else lower
    return GateLine(
        site=site,
        label=label,
        persons=cell.persons,
        change=cell.mean,
        lower=lower,
        falls=worst < -settings.margin,
    )


def _persons(changes: Mapping[str, Changes]) -> int:
    """Return how many accept; a site says by label how many of its persons have it."""
    return sum(max((c.persons for c in own.values()), default=0) for own in changes.values())


def _fall(line: GateLine, settings: RunSettings) -> str:
    where = f"{line.label} of {line.site}" if line.site else f"{line.label} over all sites"
    who = f"{line.persons} person{'s' if line.persons > 1 else ''}"
    if line.lower is None:
        return f"{where} falls by {-line.change:.3f} ({who})"
    return (
        f"{where} may fall by more than {settings.margin:g} ({line.change:+.3f} on average in "
        f"{who}, not less than {line.lower:+.3f} with confidence {settings.confidence:g})"
    )
