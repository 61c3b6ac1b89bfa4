"""What a site keeps on disk between messages: bases, plans and prepared slices."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dafne_federated.client.optimiser_files import OptimiserFiles
from dafne_federated.core.errors import ModelFileError, StateError
from dafne_federated.core.files import arrays_digest, private_folder, sha256, write_atomic
from dafne_federated.core.handshake import fingerprint
from dafne_federated.core.model_file import ModelFile, parse_model
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.slices import PreparedSlices
from dafne_federated.core.state import State, load_state, save_state
from dafne_federated.core.strategy_table import Factors
from dafne_federated.core.volumes import Case

# Raise when the way slices are prepared changes, so that old files are not used.
_SLICES_VERSION = 1


class SiteCache:
    """Files by digest; anything missing or damaged is simply not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)  # it holds images of patients

    @property
    def features(self) -> Path:
        """Folder for features of slices, see ``core/prefix_cache.py``."""
        return self.folder / "features"

    @property
    def privacy(self) -> Path:
        """Folder of the key and the ledger, see ``privacy_ledger.py``; never to be removed."""
        return self.folder / "privacy"

    def has_base(self, digest: str) -> bool:
        """Return whether the base with this digest is here, whole."""
        path = self._base(digest)
        return path.exists() and sha256(path.read_bytes()) == digest

    def base(self, digest: str) -> ModelFile:
        """Return a base; nothing of it is executed.

        Raises:
            ModelFileError: It is not here.
        """
        if not self.has_base(digest):
            msg = f"base model {digest[:16]} is not in this site's cache"
            raise ModelFileError(msg)
        return parse_model(self._base(digest).read_bytes())

    def keep_base(self, data: bytes) -> None:
        """Keep the bytes of a base under their digest."""
        write_atomic(self._base(sha256(data)), data)

    def keep_plan(self, run: str, plan: AdaptationPlan) -> None:
        """Keep the plan that was agreed to for a run."""
        write_atomic(self._plan(run, plan.digest), plan.to_json().encode())

    def plan(self, run: str, digest: str) -> AdaptationPlan | None:
        """Return the plan with this digest that was agreed to for a run, or None."""
        try:
            plan = AdaptationPlan.from_json(self._plan(run, digest).read_text(encoding="utf-8"))
        except OSError:
            return None
        return plan if plan.digest == digest else None

    def personal(self, run: str, site: str, plan: AdaptationPlan, number: int) -> State | None:
        """Return the newest own state that a site kept before round ``number`` of a run."""
        for path in sorted(self._personal(run, site, plan), reverse=True):
            if int(path.stem[-4:]) < number:
                with contextlib.suppress(StateError):
                    return load_state(path)[1]
        return None

    def keep_personal(
        self, run: str, site: str, plan: AdaptationPlan, number: int, state: State
    ) -> None:
        """Keep a site's own state after round ``number``, and the one before it.

        A round whose end the server never saw is asked for again, and starts where it started.
        """
        old = [p for p in self._personal(run, site, plan) if int(p.stem[-4:]) < number]
        for path in sorted(old)[:-1]:
            path.unlink()
        folder = self._personal_folder(run, site, plan)
        save_state(folder / f"round-{number:04d}.npz", plan, state)

    def keep_trained(self, run: str, site: str, cases: Iterable[str]) -> None:
        """Keep which cases a site trained on last in a run; their names never leave it."""
        write_atomic(self._trained(run, site), json.dumps(sorted(cases)).encode(), private=True)

    def trained(self, run: str, site: str) -> frozenset[str]:
        """Return which cases a site trained on last in a run; none if that is not known."""
        try:
            return frozenset(json.loads(self._trained(run, site).read_bytes()))
        except (OSError, ValueError):
            return frozenset()

    def optimiser(
        self, run: str, site: str, plan: AdaptationPlan, trained: Factors
    ) -> OptimiserFiles:
        """Return where a site keeps its optimiser between rounds that train these factors."""
        folder = self.folder / "optimisers" / f"{run}-{plan.digest[:16]}" / site
        return OptimiserFiles(folder / trained)

    def slices_key(self, case: Case, model: ModelFile, classification: str) -> str:
        """Return a digest of everything that the prepared slices of a case depend on."""
        content = {"image": case.image, "spacing": np.array(case.spacing)}
        content |= {f"mask {name}": mask for name, mask in case.masks.items()}
        parts = [_SLICES_VERSION, arrays_digest(content), model.sources_digest, classification]
        return sha256(json.dumps(parts).encode())

    def slices(self, key: str) -> PreparedSlices | None:
        """Return prepared slices, or None if they are not here or damaged."""
        try:
            with np.load(self._slices(key), allow_pickle=False) as archive:
                return PreparedSlices(
                    images=archive["images"],
                    labels=archive["labels"],
                    weights=archive["weights"],
                    channels=int(archive["channels"]),
                )
        except (OSError, ValueError, KeyError, EOFError):
            return None

    def keep_slices(self, key: str, slices: PreparedSlices) -> None:
        """Keep prepared slices under their key."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            images=slices.images,
            labels=slices.labels,
            weights=slices.weights,
            channels=np.array(slices.channels),
        )
        write_atomic(self._slices(key), buffer.getvalue())

    def _base(self, digest: str) -> Path:
        return self.folder / "bases" / f"{digest}.model"

    def _plan(self, run: str, digest: str) -> Path:
        # What an update of the software changes is to be agreed to anew.
        return self.folder / "plans" / f"{run}-{digest}-{fingerprint()}.json"

    def _trained(self, run: str, site: str) -> Path:
        return self.folder / "trained" / f"{run}-{site}.json"

    def _personal_folder(self, run: str, site: str, plan: AdaptationPlan) -> Path:
        return self.folder / "personal" / f"{run}-{plan.digest[:16]}" / site

    def _personal(self, run: str, site: str, plan: AdaptationPlan) -> list[Path]:
        return list(self._personal_folder(run, site, plan).glob("round-*.npz"))

    def _slices(self, key: str) -> Path:
        return self.folder / "slices" / f"{key}.npz"
