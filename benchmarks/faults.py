"""Runs that have to bear what goes wrong between hospitals: kills, networks, disks, clocks.

Run: python -m benchmarks.faults [--seeds 50] [--first 0] [--results faults.jsonl]

A coordinator and two sites run on this machine as processes with TLS and keys; the sites reach
the coordinator through a network that can be bad. One run without a fault says what has to come
out. Then each seed draws a kind of fault and a moment (every fourth seed two more), and a run has
to end with the same content digest: both sites are needed in every round, and the deadline is
longer than every outage. The kinds take turns, so that as many seeds as there are kinds show
each of them once.

Each seed appends one line to the results; seeds that are there already are left out, so that the
command goes on after an interruption. Where root may mount a disk in memory, the folders of the
coordinator and of one site are such disks, and can be full; else these two kinds do nothing, and
say so. The clock of a site is shifted by a small C library that stands before libc's (needs cc).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dafne_federated.core.backend import prepare_backend
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.versions import versions
from dafne_federated.simulations.progress import Stages
from tests.deployment.bad_network import BadNetwork
from tests.deployment.deployed import NAMES, Deployment, deployed, free_ports, wait_for
from tests.deployment.faults import AT_THE_START, FAULTS, Stage, mount_small_disk
from tests.squares import square_case, train_squares

SETTINGS = """\
rounds = 3
epochs = 1
threads = 1
device = "cpu"
margin = 0.9
min-persons = 1
max-rank = 8
min-sites = 2
deadline = 240
retries = 5
"""
LIMIT = 1200.0  # seconds for one run with its faults
RESUMES = 3  # times a person types 'server resume' after words of the run that say so
NOTHING = ("found no", "not done", "the run was over", "went wrong")  # words of what was no fault
DISKS = {"coordinator": 400, "hospital": 100}  # MiB


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--seeds", type=int, default=50)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--only", help="kinds of faults, comma between them; one a seed")
    options.add_argument("--results", type=Path, default=Path("faults.jsonl"))
    chosen = options.parse_args()
    kinds = chosen.only.split(",") if chosen.only else list(FAULTS)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    known = {line["seed"] for line in lines(chosen.results)}
    prepare_backend(1, "cpu")
    with Stages() as stages, stages.stage("Runs with faults", len(seeds)) as advance:
        for _ in known & set(seeds):
            advance("known")
        left = [seed for seed in seeds if seed not in known]
        while left:  # a deployment that is not well after a run is made anew
            with surroundings() as (deployment, network, base, mounted):
                digest, seconds = unbroken(deployment, base)
                while left:
                    name = f"seed-{left[0]}"
                    begin = run_command(deployment, base, name)
                    stage = Stage(deployment, network, deployment.run(name), begin, mounted=mounted)
                    line = bear(stage, left[0], draw(left[0], seconds, kinds), digest)
                    with chosen.results.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    if line["why"]:
                        log = chosen.results.with_suffix(f".{left[0]}.txt")
                        log.write_text(f"{json.dumps(line)}\n{logs(stage)}")
                    advance(f"seed {left.pop(0)}: {'same' if line['same'] else line['why']}")
                    if not well(deployment):
                        break
    print(table([line for line in lines(chosen.results) if line["seed"] in seeds]))


def lines(path: Path) -> list[dict[str, Any]]:
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text) for text in texts]


@contextmanager
def surroundings() -> Iterator[tuple[Deployment, BadNetwork, Path, bool]]:
    """A deployment behind a network, on small disks where root may have them."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dafne-faults-")))
        mounted = True
        for name, size in DISKS.items():
            mounted = mount_small_disk(path / name, size) and mounted
            stack.callback(
                subprocess.run, ["umount", str(path / name)], capture_output=True, check=False
            )
        (path / "base").mkdir()
        base = train_squares(path / "base").path
        network = stack.enter_context(BadNetwork(free_ports()))
        deployment = stack.enter_context(
            deployed(path, base, square_case, SETTINGS, network=network)
        )
        for site in deployment.sites.values():
            deployment.done("site", "approve", site.path, base, "--yes")
        yield deployment, network, base, mounted


def unbroken(deployment: Deployment, base: Path) -> tuple[str, float]:
    """Return the content digest of a run without a fault, and its seconds."""
    digests, begun = [], 0.0
    for name in ("warm", "unbroken"):  # the first prepares the slices of the sites
        begun = time.monotonic()
        deployment.done(*run_command(deployment, base, name))
        digests.append(deployment.run(name).result().content_digest)
    if len(set(digests)) != 1 or not digests[0]:
        sys.exit(f"two runs without a fault ended in {digests}: nothing can be compared here")
    return digests[0], time.monotonic() - begun


def run_command(deployment: Deployment, base: Path, name: str) -> list[object]:
    return [
        *("server", "run", deployment.server.path, "--base", base, "--name", name),
        *("--settings", "settings.toml", "--quiet"),
    ]


def draw(seed: int, seconds: float, kinds: list[str]) -> list[tuple[float, str]]:
    """Return moments, in seconds after the start of the run, and kinds of faults."""
    chance = random.Random(seed)
    drawn = [kinds[seed % len(kinds)]]
    if seed % 4 == 3:
        drawn += chance.sample(
            [kind for kind in kinds if kind not in drawn], min(2, len(kinds) - 1)
        )
    most = 0.8 * seconds  # a run that is a little faster shall not be over before
    moments = [0.0 if kind in AT_THE_START else chance.uniform(0, most) for kind in drawn]
    return sorted(zip(moments, drawn, strict=True))


def bear(stage: Stage, seed: int, drawn: list[tuple[float, str]], digest: str) -> dict[str, Any]:
    """Let a run bear faults, and return how it ended."""
    begun, faults, resumes, why = time.monotonic(), [], 0, ""
    threads = []

    def happen(number: int, moment: float, kind: str) -> None:
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        try:
            finished = stage.command is not None and stage.command.poll() == 0
            chance = random.Random(f"{seed} {number}")
            did = "the run was over" if finished else FAULTS[kind](stage, chance)
        except Exception:
            did = f"went wrong itself: {traceback.format_exc(limit=3)[-400:]}"
        faults.append({"kind": kind, "moment": round(moment, 1), "did": did})

    for number, (moment, kind) in enumerate(drawn):
        if kind in AT_THE_START:
            happen(number, moment, kind)
    begun = time.monotonic()
    stage.resume()
    for number, (moment, kind) in enumerate(drawn):
        if kind not in AT_THE_START:
            threads.append(threading.Thread(target=happen, args=(number, moment, kind)))
            threads[-1].start()
    while True:
        time.sleep(0.5)
        command = stage.command
        assert command is not None  # it was typed above
        if (status := command.poll()) == 0:
            break
        if time.monotonic() - begun > LIMIT:
            why = f"not ended within {LIMIT:g} s"
            command.kill()
            break
        if status is None or (status < 0 and any(kind == "kill follower" for _, kind in drawn)):
            continue
        said = last_words(stage.run)
        for thread in threads:
            thread.join()
        if stage.command is not command:  # somebody follows it again
            continue
        if resumes == RESUMES:
            why = said
            break
        time.sleep(10)
        resumes += 1  # what went wrong is over; a person types what the words say
        faults.append({"kind": "stopped in words", "moment": 0.0, "did": said})
        stage.resume()
    seconds = time.monotonic() - begun
    for thread in threads:
        thread.join()
    stage.mend()
    faults += [{"kind": "did not happen", "moment": 0.0, "did": what} for what in stage.missed]
    if why:
        stage.deployment.command(
            "server", "stop", stage.deployment.server.path, stage.run.path.name
        )
    ended = status == 0
    same = ended and stage.run.result().content_digest == digest
    events = [event["event"] for event in stage.run.events()]
    return {
        "seed": seed,
        "faults": faults,
        "ended": ended,
        "same": same,
        "starts": events.count("launched"),
        "resumed": resumes,
        "seconds": round(seconds, 1),
        "why": why or ("" if same else "another digest"),
    }


def last_words(run: RunFolder) -> str:
    reasons = [str(event["reason"]) for event in run.events() if event.get("reason")]
    return reasons[-1][:300] if reasons else "without words"


def logs(stage: Stage) -> str:
    events = "\n".join(json.dumps(event) for event in stage.run.events())
    sites = stage.deployment.sites.values()
    tails = [
        f"{log}:\n{log.read_text(errors='replace')[-6000:]}"
        for folder in (stage.deployment.server.logs, *(site.logs for site in sites))
        for log in sorted(folder.glob("*.log"))
    ]
    return "\n\n".join([events, stage.deployment.told(), *tails])


def well(deployment: Deployment) -> bool:
    """Return whether all is up again; nodes that were killed need a minute to come back."""

    def up() -> bool:
        status = deployment.command("server", "status", deployment.server.path).returncode
        return status == 0 and deployment.online() == len(NAMES)

    try:
        wait_for(up, 180)
    except AssertionError:
        return False
    return True


def table(found: list[dict[str, Any]]) -> str:
    ended, same = (sum(line[key] for line in found) for key in ("ended", "same"))
    shown = [
        f"python -m benchmarks.faults {' '.join(sys.argv[1:])}",
        ", ".join(f"{n} {v}" for n, v in versions().items()),
    ]
    shown += [f"seeds {sorted(line['seed'] for line in found)}", ""]
    shown += [
        "| seed | faults | ended | same | starts | resumed | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in sorted(found, key=lambda line: line["seed"]):
        kinds = "; ".join(
            f"{f['kind']} at {f['moment']:g} s{' (nothing)' * f['did'].startswith(NOTHING)}"
            for f in line["faults"]
        )
        words = [("no", "yes")[line[key]] for key in ("ended", "same")]
        counts = [str(line[key]) for key in ("starts", "resumed", "seconds")]
        shown.append(f"| {' | '.join([str(line['seed']), kinds, *words, *counts])} |")
    shown += ["", f"{ended} of {len(found)} ended, {same} with the digest of the unbroken run"]
    shown += [f"seed {line['seed']}: {line['why']}" for line in found if not line["same"]]
    return "\n".join(shown)


if __name__ == "__main__":
    main()
