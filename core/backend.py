"""TensorFlow as every command and every site task needs it: quiet, seeded, same bits twice."""

import contextlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from dafne_federated.core.errors import SettingsError


@dataclass(frozen=True)
class Device:
    """Where the network runs.

    Attributes:
        name: What a person would call it, e.g. ``CPU (2 threads)`` or ``GPU NVIDIA H100``.
        threads: Threads of one operation on the CPU.
    """

    name: str
    threads: int


def prepare_backend(threads: int = 0, device: str = "auto") -> Device:
    """Choose the device and make TensorFlow repeatable; call before anything builds a network.

    GPU memory grows as needed instead of being taken whole, so that several sites can share a
    card. A second call in a process keeps the first choice, because TensorFlow cannot change
    it any more.

    Args:
        threads: Threads of one operation; 0 takes all cores. The last bits of a result can
            depend on it.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``gpu``.

    Raises:
        SettingsError: A GPU was asked for and there is none.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with _silent_stderr():  # TensorFlow's library writes notes there that no setting stops
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")  # hints on how to call it, in the midst of progress bars
        cards = tf.config.list_physical_devices("GPU")
    threads = threads or len(os.sched_getaffinity(0))
    if device == "gpu" and not cards:
        msg = "device: expected a GPU, got none that TensorFlow can use; take --device cpu"
        raise SettingsError(msg)
    try:
        if device == "cpu":
            cards = []
            tf.config.set_visible_devices([], "GPU")
        for card in cards:
            tf.config.experimental.set_memory_growth(card, True)
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        tf.config.experimental.enable_op_determinism()
    except RuntimeError:  # TensorFlow is already running with an earlier choice
        threads = tf.config.threading.get_intra_op_parallelism_threads() or threads
    if cards and device != "cpu":
        details = tf.config.experimental.get_device_details(cards[0])
        return Device(f"GPU {details.get('device_name', cards[0].name)}", threads)
    return Device(f"CPU ({threads} threads)", threads)


def set_seed(*parts: object) -> int:
    """Seed Python, numpy and Keras from ``parts`` (run, site, round, ...); return the seed."""
    import keras

    seed = zlib.crc32("/".join(map(str, parts)).encode())
    keras.utils.set_random_seed(seed)
    return seed


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send what the process writes to standard error, libraries included, nowhere."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
