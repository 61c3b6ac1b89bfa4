"""What `deployment.py` prints: where the seconds of each round went, bytes, memory."""

import statistics
from dataclasses import dataclass

from dafne_federated.core.run_folder import RunFolder

CLIENT = "site: ClientApp (one message)"
PARTS = (
    "until it started",
    "start, preparation",
    "training",
    "network built, measuring",
    "way back",
    "combining",
)


@dataclass(frozen=True)
class Told:
    """One run.

    Attributes:
        name: Of the run.
        folder: Of the run.
        begun: When the command was given, seconds since 1970.
        ended: When it returned.
        passed: Bytes down and up on the line of each site, TLS included.
    """

    name: str
    folder: RunFolder
    begun: float
    ended: float
    passed: dict[str, tuple[int, int]]


def show(told, circle, watch):
    """Print where the time of a run went, and what travelled."""
    rounds = [_round(told, line, circle, watch) for line in told.folder.rounds()]
    print(f"run '{told.name}': seconds of each round, at the site that answered last")
    print(
        f"| round | s | {' | '.join(PARTS)} | over training |\n|---|---|{'---|' * len(PARTS)}---|"
    )
    for number, (_, _, parts) in enumerate(rounds, start=1):
        whole, training = sum(parts), parts[2]
        over = f"{whole / training - 1:.0%}" if training else "measured only"
        cells = " | ".join(f"{part:.1f}" for part in parts)
        print(f"| {number} | {whole:.1f} | {cells} | {over} |")
    wall, training = told.ended - told.begun, sum(parts[2] for _, _, parts in rounds)
    joining, closing = rounds[0][0] - told.begun, told.ended - rounds[-1][1]
    print(
        f"\nwall {wall:.1f} s: training {training:.1f}, everything else {wall - training:.1f}, of "
        f"which until the first round (plan, offer, base) {joining:.1f}, and after the last "
        f"(release, report) {closing:.1f}\n"
    )
    print("| site | records down / up, MB | of which first round and joining | on the line, MB |")
    print("|---|---|---|---|")
    lines = told.folder.rounds()
    for name, (down, up) in told.passed.items():
        sums = [sum(getattr(line.sites[name], way) for line in lines) / 1e6 for way in _WAYS]
        first = [getattr(lines[0].sites[name], way) / 1e6 for way in _WAYS]
        cells = (sums, first, (down / 1e6, up / 1e6))
        print(f"| {name} | " + " | ".join(f"{d:.2f} / {u:.2f}" for d, u in cells) + " |")
    print(flush=True)


_WAYS = ("bytes_down", "bytes_up")


def memory(watch):
    """Print the largest resident memory that each program had."""
    found = {}
    for one in watch.seen.values():
        if one.role:
            found.setdefault(one.role, []).append(one)
    print(
        "| program | processes | peak MiB, largest (median) | processor s, all |\n|---|---|---|---|"
    )
    for role, seen in sorted(found.items()):
        peaks = [one.peak for one in seen]
        spent = sum(one.processor for one in seen)
        cells = f"{max(peaks):.0f} ({statistics.median(peaks):.0f}) | {spent:.0f}"
        print(f"| {role} | {len(seen)} | {cells} |")


def _round(told, line, circle, watch):
    """Return when a round began and ended, and the seconds of its parts."""
    at = {}
    for event in told.folder.events():
        if event.get("round") == line.round:
            at.setdefault(event["event"], []).append(event)
    begun, end = (at[kind][0]["time"] for kind in ("round started", "round finished"))
    last = max(at["site answered"], key=lambda event: event["time"])
    answered, site = last["time"], line.sites[last["site"]]
    programs = (
        one
        for one in watch.under(circle.supervisors[last["site"]]).values()
        if one.role == CLIENT and begun < one.started < answered
    )
    # Others answer the small questions that find lost messages, in about a second.
    program = max(programs, key=lambda one: one.ended - one.started)
    left = min(program.ended, answered)
    rest = left - program.started - site.seconds - site.evaluation_seconds
    waited = program.started - begun
    parts = (waited, rest, site.seconds, site.evaluation_seconds, answered - left, end - answered)
    return begun, end, parts
