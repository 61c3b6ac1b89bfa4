"""The images of one site: its cases by their labels, prepared slices, bias fields, the loss.

What was prepared once stays in this process, and on disk in the site's cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dafne_federated.client.labels_here import labels_here
from dafne_federated.client.site_cache import SiteCache
from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.class_weights import ClassCounts, reweighted
from dafne_federated.core.dataset import CaseRef, load_case, open_folder
from dafne_federated.core.errors import DataError
from dafne_federated.core.model_runtime import Loss, RunningModel
from dafne_federated.core.preprocessing import BiasFieldCache
from dafne_federated.core.site_labels import SiteLabels
from dafne_federated.core.slices import PreparedSlices, concatenate
from dafne_federated.core.volumes import Case


@dataclass
class _Kept:
    """What this process keeps between messages, by site."""

    slices: dict[tuple[str, str, ClassCounts | None], PreparedSlices] = field(default_factory=dict)
    persons: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    bias_fields: dict[str, BiasFieldCache] = field(default_factory=dict)


_KEPT = _Kept()


class SiteData:
    """What a site's folder of images gives.

    Args:
        settings: The site.
        cache: Where prepared slices are kept.
    """

    def __init__(self, settings: SiteSettings, cache: SiteCache) -> None:
        self.settings = settings
        self.cache = cache

    def labels(self, labels: Sequence[str]) -> SiteLabels:
        """Return how the site's masks stand for the labels of a model; see ``labels_here``."""
        return labels_here(self.settings, labels)

    def cases(self, names: tuple[str, ...], labels: Sequence[str]) -> Iterator[Case]:
        """Yield the named cases with masks for the labels of a model.

        Raises:
            DataError: A case is not in the folder, or cannot be read.
        """
        folder, here = open_folder(self.settings.data), self.labels(labels)
        known: dict[str, CaseRef] = {ref.name: ref for ref in folder.cases}
        for name in names:
            if name not in known:
                msg = f"case {name!r} is not in the site's folder"
                raise DataError(msg)
            yield here.case(load_case(known[name], folder.labels))

    def slices(self, model: RunningModel, classes: ClassCounts | None = None) -> PreparedSlices:
        """Return all training slices as ``model`` prepares them.

        Args:
            model: The base.
            classes: Counts of all sites, to weigh labels by; by default those of each case.

        Raises:
            DataError: There is no slice that can be trained on.
        """
        key = (*self._key(model), classes)
        if key not in _KEPT.slices:
            _KEPT.slices.pop((*key[:2], None), None)  # the same images with other weights
            cases = self.cases(self.settings.training, model.labels)
            prepared = [(case.person, self._prepared(model, case)) for case in cases]
            _KEPT.persons[key[:2]] = tuple(
                person for person, part in prepared for _ in range(len(part or ()))
            )
            parts = [part for _, part in prepared if part]
            if classes:
                parts = [reweighted(part, classes) for part in parts]
            if not parts:
                msg = "no slice of the training cases can be trained on"
                raise DataError(msg)
            _KEPT.slices[key] = concatenate(parts)
        return _KEPT.slices[key]

    def persons(self, model: RunningModel) -> tuple[str, ...]:
        """Return whose each training slice is, once ``slices`` has prepared them."""
        return _KEPT.persons[self._key(model)]

    def loss(self, model: RunningModel) -> Loss:
        """Return the base's loss; where all slices came from disk it is still to be captured."""
        cases = self.cases(self.settings.training, model.labels)
        while model.loss is None:
            model.prepare(next(cases), self.settings.classification, self.bias_fields())
        return model.loss

    def bias_fields(self) -> BiasFieldCache:
        """Return the site's kept bias fields."""
        folder = self.settings.bias_fields or self.settings.cache / "bias-fields"
        return _KEPT.bias_fields.setdefault(str(folder), BiasFieldCache(folder))

    def _key(self, model: RunningModel) -> tuple[str, str]:
        labels = self.labels(model.labels)
        names = "/".join((*self.settings.training, repr((labels.names, labels.missing))))
        return f"{self.settings.cache}/{names}", model.file.digest

    def _prepared(self, model: RunningModel, case: Case) -> PreparedSlices | None:
        classification = self.settings.classification
        key = self.cache.slices_key(case, model.file, classification)
        slices = self.cache.slices(key)
        if slices is None:
            slices = model.prepare(case, classification, self.bias_fields())
            if slices is not None:
                self.cache.keep_slices(key, slices)
        return slices
