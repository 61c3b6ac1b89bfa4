"""A server that remembers the changes of earlier rounds: Flower's momentum and Adam.

What a round would change is taken as a gradient, and Flower's own strategies make the step: they
are given the state that was sent and, as the only reply, the aggregate of the round. Their memory
is written beside the checkpoint of the round, before the line that makes the round count, so a
run that is started again goes on in the same bits. Each array has a memory and a count of steps
of its own: with strategy ``alternating`` a factor remembers the rounds in which it moved.

Source:
    FedAvgM, https://arxiv.org/abs/1909.06335; FedAdam, https://arxiv.org/abs/2003.00295.
"""

import contextlib
import logging
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM

from dafne_federated.core.errors import RunError
from dafne_federated.core.files import write_atomic
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.state import State, moving_arrays, npz_bytes
from dafne_federated.core.strategy_table import round_rule
from dafne_federated.core.wire import TRAIN_ROUND, array_record

Values = dict[str, npt.NDArray[np.floating]]


@dataclass
class Memory:
    """What a server optimiser knows, by state key.

    Attributes:
        steps: How often each array has moved.
        first: Momentum, or Adam's mean of changes.
        second: Adam's mean of squared changes.
    """

    steps: dict[str, int] = field(default_factory=dict)
    first: Values = field(default_factory=dict)
    second: Values = field(default_factory=dict)


def stepped(
    folder: RunFolder,
    settings: RunSettings,
    plan: AdaptationPlan,
    number: int,
    before: State,
    after: State,
) -> State:
    """Return the state that the server makes of the aggregate of a round; none keeps it as it is.

    Factors that stood still in this round and stored statistics come out bit for bit.

    Args:
        folder: Where the memory lies.
        settings: Those of the run.
        plan: What is trained.
        number: The round.
        before: The state that the sites were sent.
        after: The aggregate.

    Raises:
        RunError: The memory of the round before is missing or damaged.
    """
    if settings.server_optimiser == "none":
        return after
    names = moving_arrays(plan, before, round_rule(settings.strategy, number).held)
    memory = _load(_path(folder, number - 1)) if number > 1 else Memory()
    result = dict(after)
    counts = {name: memory.steps.get(name, 0) + 1 for name in names}
    for count in sorted(set(counts.values())):
        group = [name for name in names if counts[name] == count]
        result |= _step(settings, group, before, after, memory, count)
    write_atomic(_path(folder, number), _bytes(memory))
    return result


def _step(
    settings: RunSettings, names: list[str], before: State, after: State, memory: Memory, count: int
) -> State:
    """Move arrays that have moved ``count - 1`` times; the memory goes along."""
    sent, mean = ({name: state[name] for name in names} for state in (before, after))
    known = count > 1
    record = RecordDict(
        {"arrays": array_record(mean), "metrics": MetricRecord({"num-examples": 1})}
    )
    reply = Message(record, 1, TRAIN_ROUND)
    rate = settings.server_rate_used
    with _quiet():
        if settings.server_optimiser == "momentum":
            momentum = FedAvgM(server_learning_rate=rate, server_momentum=settings.server_momentum)
            momentum.current_arrays = array_record(sent)
            if known and settings.server_momentum:  # Flower keeps nothing with a momentum of 0
                momentum.momentum_vector = [memory.first[n] for n in names]
            found, _ = momentum.aggregate_train(count, [reply])
            vector = momentum.momentum_vector or ()
            memory.first |= dict(zip(names, vector, strict=False))
        else:
            adam = FedAdam(eta=rate, beta_1=settings.server_momentum)
            adam.current_arrays = sent
            adam.m_t = {n: memory.first[n] for n in names} if known else None
            adam.v_t = {n: memory.second[n] for n in names} if known else None
            found, _ = adam.aggregate_train(count, [reply])
            memory.first |= adam.m_t or {}
            memory.second |= adam.v_t or {}
    assert isinstance(found, ArrayRecord)  # one reply without an error always has a result
    memory.steps |= dict.fromkeys(names, count)
    return {name: found[name].numpy().astype(np.float32) for name in names}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower from telling of one reply: ours are told of elsewhere."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _path(folder: RunFolder, number: int) -> Path:
    return folder.path / "checkpoints" / f"server-optimiser-{number:04d}.npz"


def _bytes(memory: Memory) -> bytes:
    arrays: Mapping[str, npt.NDArray[np.generic]] = {
        **{f"steps/{name}": np.array([count]) for name, count in memory.steps.items()},
        **{f"first/{name}": value for name, value in memory.first.items()},
        **{f"second/{name}": value for name, value in memory.second.items()},
    }
    return npz_bytes(dict(sorted(arrays.items())))


def _load(path: Path) -> Memory:
    memory = Memory()
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                part, _, key = name.partition("/")
                if part == "steps":
                    memory.steps[key] = int(archive[name][0])
                else:
                    {"first": memory.first, "second": memory.second}[part][key] = archive[name]
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile) as error:
        msg = f"{path}: what the server optimiser knew cannot be read: {error}"
        raise RunError(msg) from None
    return memory
