"""What a site calls the labels of a model, and which of them nobody annotated there.

Labels are matched by name alone. A label that the site's own table (``dataset.json``, or the
names of masks in bundles) does not know was not annotated: it is masked out of the loss. One
that the table knows and a person lacks is annotated, as absent.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dafne_federated.core.errors import DataError, SettingsError
from dafne_federated.core.findings import model_label
from dafne_federated.core.volumes import Case

Masks = dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class SiteLabels:
    """How a site's masks stand for the labels of a model.

    Attributes:
        labels: Labels of the model, channel 1 first.
        names: The site's own name by label, where it differs.
        missing: Channels of the labels that were not annotated there, in order.
    """

    labels: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    missing: tuple[int, ...]

    @property
    def lacking(self) -> tuple[str, ...]:
        """The missing labels by name."""
        return tuple(self.labels[channel - 1] for channel in self.missing)

    def masks(self, masks: Masks) -> Masks:
        """Return masks under the names of the model, without those of missing labels.

        A mask that bears the name of a label which the site calls otherwise is something else,
        and is left out.
        """
        named = {}
        for own, mask in masks.items():
            name = model_name(own, dict(self.names))
            if name is not None and model_label(name, self.labels) not in self.lacking:
                named[name] = mask
        return named

    def case(self, case: Case) -> Case:
        """Return a case with ``masks`` of its masks."""
        return replace(case, masks=self.masks(case.masks))


def site_labels(
    labels: Sequence[str],
    known: Collection[str],
    names: Mapping[str, str] | None = None,
    annotated: Collection[str] | None = None,
) -> SiteLabels:
    """Return how a site's masks stand for the labels of a model.

    Args:
        labels: Labels of the model, channel 1 first.
        known: Names that the site's label table knows.
        names: The site's own name by label, where it differs.
        annotated: Labels that were annotated, where the table cannot tell; None goes by it.

    Raises:
        SettingsError: ``names`` or ``annotated`` holds what is not a label of the model, two
            labels have one name, or no label is left.
        DataError: The table does not know one of ``names``.
    """
    names = names or {}
    for setting, given in (("label_names", names), ("annotated", annotated or ())):
        if unknown := sorted(set(given) - set(labels)):
            msg = f"{setting}: expected labels of the model, {list(labels)}, got {unknown[0]!r}"
            raise SettingsError(msg)
    if len(set(names.values())) < len(names):
        msg = f"label_names: expected a name of its own for each label, got {dict(names)}"
        raise SettingsError(msg)
    there = {plain for name in known for plain in (name, _without_side(name))}
    if gone := [own for own in names.values() if own not in there]:
        msg = f"label_names: expected names of the data, {sorted(known)}, got {gone[0]!r}"
        raise DataError(msg)
    found = {model_label(n, labels) for own in known if (n := model_name(own, names)) is not None}
    chosen = found if annotated is None else set(annotated)
    missing = tuple(c for c, label in enumerate(labels, start=1) if label not in chosen)
    if len(missing) == len(labels):
        msg = (
            f"no label of the model, {list(labels)}, is annotated here; if they have other names "
            "in the data, say so in label_names"
        )
        raise SettingsError(msg)
    own_names = tuple(sorted((label, own) for label, own in names.items() if label != own))
    return SiteLabels(tuple(labels), own_names, missing)


def model_name(own: str, names: Mapping[str, str]) -> str | None:
    """Return what a mask is called for a model; None where it only looks like a label of it.

    Args:
        own: Its name in the data; one with a side, ``..._L`` or ``..._R``, keeps the side.
        names: The site's own name by label.
    """
    for label, name in names.items():
        if own in (name, f"{name}_L", f"{name}_R"):
            return label + own.removeprefix(name)
    return None if own in names or _without_side(own) in names else own


def _without_side(name: str) -> str:
    return name[:-2] if name.endswith(("_L", "_R")) else name
