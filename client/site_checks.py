"""What one check of a site found, and checks of the machine: disk, memory, processor."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.dry_run import physical_memory_mib

_PROBE = 4 * 2**20  # bytes that are written to see whether the disk takes them
_BASES_MIB = 2048  # room for a few bases and prepared slices
_LEAST_MEMORY_MIB = 4096  # TensorFlow and a network of Dafne's take 1.5 to 3 GiB


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ``ok``; ``warn`` where it works but somebody should know; ``fail``.
        found: In words; they may name paths, and are for the site's people alone.
        advice: What to do and whom to tell; empty if ok.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def fine(name: str, found: str) -> Check:
    """Return a check that found nothing wrong."""
    return Check(name, "ok", found)


def warned(name: str, found: str, advice: str) -> Check:
    """Return a check that found something that somebody should know."""
    return Check(name, "warn", found, advice)


def failed(name: str, found: str, advice: str) -> Check:
    """Return a check that found what must be put right first."""
    return Check(name, "fail", found, advice)


def check_machine(settings: SiteSettings, home: Path) -> Iterator[Check]:
    """Yield what is found of disk and memory.

    Args:
        settings: The site.
        home: Folder of the site, where logs go.
    """
    yield check_disk("disk of the cache", settings.cache, _needed_mib(settings))
    yield check_disk("disk of the site", home, 64)
    memory = physical_memory_mib()
    if memory is None:
        yield warned("memory", "this system does not tell", "see that there are 4 GiB or more")
    elif memory < _LEAST_MEMORY_MIB:
        advice = "training may be ended for want of memory: ask for 4 GiB or more"
        yield warned("memory", f"{memory / 1024:.1f} GiB", advice)
    else:
        yield fine("memory", f"{memory / 1024:.1f} GiB, {len(os.sched_getaffinity(0))} cores")


def check_disk(name: str, folder: Path, needed_mib: float) -> Check:
    """Return whether a folder can be written to, and has room.

    Args:
        name: Of the check.
        folder: The folder; it need not exist yet.
        needed_mib: What should be free, in MiB.
    """
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * _PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = "make room, or give the site's user the right to write there"
        return failed(name, f"{folder} cannot be written to: {error.strerror}", advice)
    free = shutil.disk_usage(folder).free / 2**20
    found = f"{free / 1024:.1f} GiB free in {folder}"
    if free < needed_mib:
        advice = f"make room for {needed_mib / 1024:.1f} GiB, or lower prefix-cache-mib"
        return warned(name, found, advice)
    return fine(name, found)


def _needed_mib(settings: SiteSettings) -> float:
    features = settings.prefix_cache_mib if settings.prefix_cache else 0
    folder = settings.cache / "features"
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    return _BASES_MIB + max(features - kept, 0)
