"""The whole circle between processes with TLS and keys: seconds, bytes and memory beside training.

Run: python benchmarks/deployment.py --keep DIR [--data FOLDER] [--network small] [--rate 2]

Four sites, one for each centre of the spinal cord set (``--data``, else ``spinalcord_gm`` in the
folder that the variable DAFNE_FEDERATED_TEST_DATA names), and a coordinator, on this machine: init,
register, approve, start and run by the commands that people type. Each site reaches the
coordinator over a line of its own, which counts bytes; a second run sends everything, the base
included, over lines of ``--rate`` MB/s. The release of the first is opened by Dafne's own loader.

The base has the geometry of Dafne's thigh network (26.6 M parameters, 106 MB) and random weights:
time, bytes and memory depend on shapes alone. Each centre has one person; where it has a second
scan of that person, the site measures on it, for the time that this takes. No Dice is reported.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import deployment_tables as tables
import numpy as np
from deployment_tables import Told
from network_proxy import Line
from process_watch import Watch

from dafne_federated.client.deployment_folder import SiteFolder
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.server.deployment_folder import ServerFolder
from dafne_federated.server.deployment_processes import server_health

PACKAGES = ("flwr", "keras", "tensorflow", "numpy", "dafne-dl")
PROGRAM = [sys.executable, "-P", "-m", "dafne_federated.cli.app"]
BASE = "base.model"
_GIVEN = set()  # ports


def command(keep, *arguments):
    """Do what a person types; end with what it said where it fails."""
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        env=environment(keep), cwd=keep, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{arguments}: {done.stdout}{done.stderr}")
    return done.stdout


def environment(keep):
    return {**os.environ, "DAFNE_FEDERATED_HOME": str(keep / "home")}


def wait_for(ready, what):
    end = time.monotonic() + 240
    while not ready():
        if time.monotonic() > end:
            sys.exit(f"not within four minutes: {what}")
        time.sleep(0.3)


def free_ports(count):
    """Return neighbouring ports of this machine that nobody listens on."""
    for first in range(20_000 + count * (os.getpid() % 1000), 32_000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            for port in range(first, first + count):
                opened.enter_context(socket.socket()).bind(("127.0.0.1", port))
            if first not in _GIVEN:
                _GIVEN.update(range(first, first + count))
                return range(first, first + count)
    sys.exit("no ports are free")


def make_base(path, network, labels):
    """Write a base with random weights; in a process of its own."""
    from dafne_federated.core.backend import prepare_backend, set_seed
    from dafne_federated.core.function_sources import NetworkSpec, thigh_spec
    from dafne_federated.core.model_file import write_model
    from dafne_federated.core.model_runtime import build_model

    prepare_backend(0, "cpu")
    spec = thigh_spec(labels)
    if network == "small":
        spec = NetworkSpec(labels=labels, size=64, resolution=(2.0, 2.0), filters=(4, 8, 8, 8))
    set_seed(1, "base")
    names = {"model_name": "Cord", "model_type": "DynamicDLModel", "dimensionality": "2"}
    write_model(build_model("cord", spec.sources(), 1, names | {"variants": [""]}), path)


def centres(data):
    """Return the rows of the participants of each centre, by its name."""
    with (data / "participants.csv").open(newline="") as file:
        rows = [{**row, "person": row["subject"]} for row in csv.DictReader(file)]
    found = {}
    for row in rows:
        found.setdefault(row["site"], []).append(row)
    return found


def write_data(folder, data, rows):
    """Write the folder of one centre."""
    for row in rows:
        for name in (row["image"], row["label"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / name, folder / name)
    shutil.copyfile(data / "dataset.json", folder / "dataset.json")
    columns = ("subject", "image", "label", "person", "site")
    with (folder / "participants.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def settle(settings_file, rows, threads):
    """Say in the settings of a site how it computes, and that it measures on its second scan."""
    text = settings_file.read_text().replace("threads = 0", f"threads = {threads}")
    first, *second = (row["subject"] for row in rows)
    for name, cases in (("training", [first]), ("validation", second)):
        text = re.sub(rf"(?m)^{name} = \[[^\]]*\]", f"{name} = {json.dumps(cases)}", text)
    settings_file.write_text(text.replace('"auto"', '"cpu"'))


@dataclass
class Circle:
    """What is on this machine: a coordinator, its sites, a line and a supervisor for each."""

    keep: Path
    server: ServerFolder
    sites: dict[str, SiteFolder]
    lines: dict[str, Line]
    supervisors: dict[str, int]


@contextlib.contextmanager
def started(options, keep):
    """Set everything up as the pages say, and end it afterwards."""
    data = options.data
    labels = tuple(json.loads((data / "dataset.json").read_text())["labels"].values())
    if not (keep / BASE).exists():
        made = [sys.executable, __file__, "--make-base", options.network, *labels]
        subprocess.run([*made, "--keep", keep], check=True, stderr=subprocess.DEVNULL)
    server, (port, local, *_) = ServerFolder(keep / "coordinator"), free_ports(4)
    command(
        keep, "server", "init", server.path, "--host", "localhost", "--listen", "127.0.0.1",
        "--port", port, "--local-port", local,
    )  # fmt: skip
    circle, running = Circle(keep, server, {}, {}, {}), []
    output = (keep / "output.log").open("ab")

    def start(kind, folder):
        running.append(
            subprocess.Popen(
                [*PROGRAM, kind, "start", str(folder)],
                env=environment(keep), stdout=output, stderr=output,
            )
        )  # fmt: skip
        return running[-1].pid

    try:
        start("server", server.path)
        for name, rows in sorted(centres(data).items()):
            write_data(keep / f"data-{name}", data, rows)
            line = circle.lines[name] = Line(port)
            site = circle.sites[name] = SiteFolder(keep / name)
            command(
                keep, "site", "init", site.path, "--name", name, "--ca", server.authority,
                "--coordinator", f"localhost:{line.port}", "--data", keep / f"data-{name}",
                "--local-port", free_ports(3)[0],
            )  # fmt: skip
            settle(site.settings_file, rows, options.threads)
            command(keep, "site", "approve", site.path, keep / BASE, "--yes")
        wait_for(lambda: all(server_health(server).values()), "the coordinator is up")
        for name, site in circle.sites.items():
            command(keep, "server", "register", server.path, name, site.request_file(name))
            circle.supervisors[name] = start("site", site.path)
        count = len(circle.sites)
        wait_for(
            lambda: command(keep, "server", "sites", server.path).count("online") == count,
            "all sites are online",
        )
        command(keep, "approve", keep / BASE, "--yes")
        yield circle
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def run(circle, name):
    """Run a federation; return what there is to tell of it."""
    before = {site: (line.down, line.up) for site, line in circle.lines.items()}
    begun = time.time()
    command(
        circle.keep, "server", "run", circle.server.path, "--base", circle.keep / BASE,
        "--name", name, "--settings", circle.keep / "settings.toml", "--quiet",
    )  # fmt: skip
    ended = time.time()
    passed = {
        site: (line.down - before[site][0], line.up - before[site][1])
        for site, line in circle.lines.items()
    }
    return Told(name, RunFolder(circle.server.run_path(name)), begun, ended, passed)


def open_release(path):
    """Open a release with Dafne's own loader and apply it to a slice."""
    from dafne_dl.model_loaders import generic_load_model

    with path.open("rb") as file:
        model = generic_load_model(file, install_deps=False)
    rows = np.random.default_rng(1).normal(100, 20, (96, 96)).astype(np.float32)
    found = model.apply({"image": rows, "resolution": np.ones(2), "classification": ""})
    print(f"{type(model).__name__}, {', '.join(sorted(found))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, help="a new folder for everything")
    parser.add_argument("--data", type=Path, help="by default spinalcord_gm of the test data")
    parser.add_argument("--network", choices=("thigh", "small"), default="thigh")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--layers", default="decoder")
    parser.add_argument(
        "--rate", type=float, default=2.0, help="MB/s of a slow line; 0: no such run"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each site")
    parser.add_argument("--make-base", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep = options.keep.resolve()
    if options.make_base:
        make_base(keep / BASE, options.make_base[0], options.make_base[1:])
        return
    if options.open:
        open_release(options.open)
        return
    options.data = options.data or Path(os.environ["DAFNE_FEDERATED_TEST_DATA"]) / "spinalcord_gm"
    if (keep / "coordinator").exists():
        sys.exit(f"{keep}: expected a folder that is new, or holds a {BASE} alone")
    keep.mkdir(parents=True, exist_ok=True)
    (keep / "settings.toml").write_text(
        f'rounds = {options.rounds}\nepochs = {options.epochs}\nlayers = "{options.layers}"\n'
        'device = "cpu"\ngate = "none"\nmin-sites = 4\n'
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends, too
    begun = time.time()
    print(f"command: python benchmarks/deployment.py {' '.join(sys.argv[1:])}")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {versions}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"seed 1, {os.cpu_count()} cores, {options.threads} threads a site, load {load}")
    with Watch() as watch, started(options, keep) as circle:
        size = (keep / BASE).stat().st_size / 1e6
        print(f"base {size:.1f} MB; {options.layers} of {options.network}; {options.epochs} epochs")
        print(f"set up, start and register: {time.time() - begun:.0f} s\n", flush=True)
        told = run(circle, "local")
        tables.show(told, circle, watch)
        release = next(told.folder.release.glob("*.model"))
        opened = [sys.executable, __file__, "--keep", keep, "--open", release]
        said = subprocess.run(opened, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(f"release opened and applied by Dafne: {said.splitlines()[-1]}\n", flush=True)
        if options.rate:
            for name, site in circle.sites.items():
                shutil.rmtree(site.settings.cache / "bases")  # it travels again
                circle.lines[name].rate = options.rate * 1e6
            tables.show(run(circle, "slow"), circle, watch)
    tables.memory(watch)
    print(f"\n{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
