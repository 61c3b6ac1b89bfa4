"""Which labels of a model this site annotated, and what it calls them."""

from collections.abc import Sequence

from dafne_federated.client.site_settings import SiteSettings
from dafne_federated.core.dataset import label_names, open_folder
from dafne_federated.core.site_labels import SiteLabels, site_labels


def labels_here(settings: SiteSettings, labels: Sequence[str]) -> SiteLabels:
    """Return how the masks of a site stand for the labels of a model.

    Its label table is what the folder says of its training cases; see ``SiteSettings`` for what
    else decides.

    Raises:
        SettingsError: A setting is about what the model does not have, or no label is left.
        DataError: The folder cannot be read, or does not know a name that a setting gives.
    """
    folder = open_folder(settings.data)
    training = set(settings.training)
    cases = [ref for ref in folder.cases if ref.name in training]
    known = {name for ref in cases or folder.cases for name in label_names(ref, folder)}
    return site_labels(labels, known, settings.label_names, settings.annotated)
