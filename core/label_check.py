"""Labels of a model that a folder lacks or calls otherwise, and what becomes of them."""

import difflib
import json
from collections.abc import Collection, Iterator, Sequence

from dafne_federated.core.findings import Finding, enumerated, model_label
from dafne_federated.core.site_labels import SiteLabels

_NEAR = 0.5


def check_absent(
    labels: Sequence[str], known: Collection[str], drawn: Collection[str], here: SiteLabels | None
) -> Iterator[Finding]:
    """Say which labels the folder lacks, as unknown there or as never drawn.

    Args:
        labels: Labels asked for.
        known: Names that the folder's label table knows, as the model calls them.
        drawn: Labels that have a voxel in any case.
        here: How the site's masks stand for the labels, where its settings were given.
    """
    named = {model_label(name, labels) for name in known}
    missing = [label for label in labels if label not in named]
    if here is not None:
        missing = list(here.lacking)
        for label, own in here.names:
            what = f"The model's {label!r} is called {own!r} in this folder."
            yield Finding(
                "note", "", what, "Nothing is to be done: the settings of the site say so."
            )
    absent = [label for label in labels if label not in drawn and label not in missing]
    if labels and not set(labels) & set(drawn):
        what = f"None of the labels asked for is drawn: {enumerated(labels)}."
        advice = (
            "Name the drawn labels exactly so, capitals and spaces included, or give their names "
            "as label_names in the settings of the site."
        )
        yield Finding("error", "", what, advice)
        return
    if absent:
        what = f"Drawn in no case at all: {enumerated(absent)}."
        advice = (
            "Right if nobody scanned has them: the model learns that nothing here is one. If "
            "nobody looked for them, leave them out of 'annotated' in the settings of the site."
        )
        yield Finding("warning", "", what, advice)
    if missing:
        others = sorted(name for name in known if model_label(name, labels) is None)
        what = f"Not annotated in this folder: {enumerated(missing)}."
        advice = (
            "Nothing is learned of them here, and what is not drawn is not taken for background "
            "there; the other labels are learned as ever."
        )
        if others:
            advice += (
                f" The folder also names {enumerated(others)}: if that is the same, say so in the "
                f"settings of the site, as in {_example(missing, others)}."
            )
        yield Finding("warning" if others else "note", "", what, advice)


def _example(missing: Sequence[str], others: Sequence[str]) -> str:
    """Return a setting that fits the most alike names, else the first ones."""
    pairs = [(m, o) for m in missing for o in difflib.get_close_matches(m, others, 1, _NEAR)]
    label, own = [*pairs, (missing[0], others[0])][0]
    return f'"label_names": {json.dumps({label: own}, ensure_ascii=False)}'
