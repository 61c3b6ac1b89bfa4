"""What a site spent of its persons' privacy, and the key that its noise follows from.

Both lie in the folder ``privacy`` of the site's cache and must outlive whatever else is removed
there: without the ledger a site no longer knows what it spent, and whoever has the key can
take the noise off. A key without its ledger is therefore refused. A marker outside the cache
says how many releases the ledger must hold: one that is lost together with the whole cache, or
comes from an older backup, is noticed, and no noise is given until the site's people put it back
or remove the marker.

A release is named by everything that its bits follow from. It is written down before it is
made: after a kill it counts although nobody saw it, and the same question again gives the same
bits and is not counted again. A run that receives what another asked first has spent it too: its
own epsilon is that of all releases that it received, and each counts once in that of all runs.
"""

import hmac
import secrets
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dafne_federated.core.errors import ApprovalError
from dafne_federated.core.files import locked, private_folder, write_atomic
from dafne_federated.core.privacy_accountant import Spent, epsilon_of

KEY_BYTES = 32


class Release(BaseModel):
    """One answer with noise.

    Attributes:
        name: Follows from all that its bits follow from, and from the site's key.
        run: Name of the run that asked first.
        round: Its round.
        base_digest: SHA-256 of the base.
        noise: Multiple of the clip.
        rate: Probability with which a person takes part in a step.
        steps: Steps.
        later_runs: Runs that asked the same later and received the same bits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    run: str
    round: int
    base_digest: str
    noise: float = Field(gt=0)
    rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    later_runs: tuple[str, ...] = Field(default=(), strict=False)

    def given_to(self, run: str) -> Self:
        """Return this release with ``run`` among those that received it."""
        if run in (self.run, *self.later_runs):
            return self
        return self.model_copy(update={"later_runs": (*self.later_runs, run)})

    @property
    def spent(self) -> Spent:
        """What it costs."""
        return Spent(self.noise, self.rate, self.steps)


class _Ledger(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    releases: tuple[Release, ...] = Field(default=(), strict=False)


class _Marker(BaseModel):
    """How many releases the ledger held at least."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    releases: int = Field(ge=0)


class PrivacyLedger:
    """The ledger and the key of a site.

    Args:
        folder: Where they lie; made if it is missing.
        key: Of a site that has none yet. Only a simulation gives it, so that it can be run
            again with the same bits; by default it is made here and known nowhere else.
        marker: A file that is not lost with ``folder``; None where nothing is to be protected.

    Raises:
        ApprovalError: There is a key and no ledger, or less in it than the marker says.
    """

    def __init__(self, folder: Path, key: bytes | None = None, marker: Path | None = None) -> None:
        self.folder = private_folder(folder)
        self._path = folder / "ledger.json"
        self._key = folder / "key"
        self._marker = marker
        with self._locked():
            self._compare_with_marker()
            if self._key.exists() and not self._path.exists():
                raise ApprovalError(_LOST)
            if not self._path.exists():  # before the key, so that a kill leaves no key alone
                self._write(())
            if not self._key.exists():
                write_atomic(self._key, key or secrets.token_bytes(KEY_BYTES), private=True)

    def name(self, content: str) -> str:
        """Return the name of the release that follows from ``content``."""
        return self._derive("release", content).hex()

    def seed(self, content: str) -> bytes:
        """Return the seed of its draws and noise, 32 bytes."""
        return self._derive("noise", content)

    def releases(self) -> tuple[Release, ...]:
        """Return all releases so far.

        Raises:
            ApprovalError: The ledger is damaged or gone.
        """
        try:
            return _Ledger.model_validate_json(self._path.read_bytes()).releases
        except (OSError, ValidationError):
            raise ApprovalError(_LOST) from None

    def spend(self, release: Release, delta: float, bound: float) -> tuple[float, float]:
        """Write down that a run receives a release; return epsilon of this run and of all runs.

        Args:
            release: What is about to be made.
            delta: Of the guarantee.
            bound: The largest epsilon of all releases together.

        Raises:
            ApprovalError: It would pass the bound, or the ledger is damaged; nothing is written.
        """
        with self._locked():
            known = {old.name: old for old in self.releases()}
            new = release.name not in known
            known[release.name] = known.get(release.name, release).given_to(release.run)
            after = tuple(known.values())
            own, total = self._totals(after, release.run, delta)
            if new and not total <= bound:
                msg = (
                    f"with this round one person's data would have been used up to epsilon "
                    f"{total:.3g} (delta {delta:g}) at this site, and it allows {bound:g}; take "
                    "more noise or fewer epochs and rounds, or ask the site to allow more"
                )
                raise ApprovalError(msg)
            self._write(after)
            self._mark(len(after))
            return own, total

    def _totals(self, releases: tuple[Release, ...], run: str, delta: float) -> tuple[float, float]:
        total = epsilon_of([release.spent for release in releases], delta)
        mine = [old.spent for old in releases if run in (old.run, *old.later_runs)]
        return (total if len(mine) == len(releases) else epsilon_of(mine, delta)), total

    def _derive(self, purpose: str, content: str) -> bytes:
        key = self._key.read_bytes()
        if len(key) != KEY_BYTES:
            raise ApprovalError(_LOST)
        return hmac.digest(key, f"{purpose}\n{content}".encode(), "sha256")

    def _compare_with_marker(self) -> None:
        marked = 0
        if self._marker is not None and self._marker.exists():
            try:
                marked = _Marker.model_validate_json(self._marker.read_bytes()).releases
            except ValidationError:
                msg = f"the site's file {self._marker.name!r} is damaged; restore it from a backup"
                raise ApprovalError(msg) from None
        known = len(self.releases()) if self._path.exists() else 0
        if known < marked:
            assert self._marker is not None
            msg = (
                f"this site gave {marked} answers with noise, and the ledger of what they spent "
                f"of its persons' privacy knows {known}; its people must restore the folder "
                f"'privacy' of its cache, or decide that counting begins anew and remove "
                f"{self._marker.name!r}"
            )
            raise ApprovalError(msg)
        if known > marked:  # of before there were markers, or killed in between
            self._mark(known)

    def _mark(self, releases: int) -> None:
        if self._marker is not None:
            text = _Marker(releases=releases).model_dump_json()
            write_atomic(self._marker, text.encode() + b"\n", private=True)

    def _write(self, releases: tuple[Release, ...]) -> None:
        text = _Ledger(releases=releases).model_dump_json(indent=2)
        write_atomic(self._path, text.encode())

    def _locked(self) -> AbstractContextManager[None]:
        """Let one process at a time look and write."""
        return locked(self.folder / "lock")


_LOST = (
    "the ledger of what this site spent of its persons' privacy, or its key, is damaged or gone; "
    "restore the folder 'privacy' of its cache from a backup"
)
