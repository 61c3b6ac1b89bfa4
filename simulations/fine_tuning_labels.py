"""Which labels a fine-tuned model has: those of its base, or those of the data."""

from collections.abc import Sequence
from dataclasses import dataclass

from dafne_federated.core.approvals import Approvals
from dafne_federated.core.dataset import CaseRef, DataFolder, label_names
from dafne_federated.core.errors import DataError, RunError, SettingsError
from dafne_federated.core.fine_tuning_folder import FineTuningFolder
from dafne_federated.core.model_file import ModelFile, model_labels, read_model, write_model
from dafne_federated.core.new_task import new_task


@dataclass(frozen=True)
class LabelChoice:
    """The labels of the new model.

    Attributes:
        labels: Labels that need a new output layer; None for those of the base.
        note: What a person should know of it; empty if nothing.
    """

    labels: tuple[str, ...] | None
    note: str = ""


def choose_labels(
    given: ModelFile, data: DataFolder, cases: Sequence[CaseRef], wanted: str | None
) -> LabelChoice:
    """Return the labels of the new model.

    Args:
        given: The model.
        data: The images.
        cases: Those of them that are used.
        wanted: ``base`` for the model's own labels, or label names with commas between them;
            None for its own if it knows all labels of the data, else for those of the data.

    Raises:
        SettingsError: The data has no label of a wanted name.
    """
    own = own_labels(given)
    drawn = dict.fromkeys(name for case in cases for name in label_names(case, data))
    lacking = [name for name in own if name not in {_plain(name, own) for name in drawn}]
    kept = LabelChoice(None, _lacking_note(lacking) if len(lacking) < len(own) else "")
    if wanted == "base":
        return kept
    if wanted is not None:
        chosen = tuple(name.strip() for name in wanted.split(","))
        there = {_plain(name, chosen) for name in drawn}
        if missing := [name for name in chosen if name not in there]:
            msg = f"labels: expected names of the data, {sorted(there)}, got {missing[0]!r}"
            raise SettingsError(msg)
        return kept if chosen == own else LabelChoice(chosen)
    names = tuple(dict.fromkeys(_plain(name, own) for name in drawn))
    unknown = [name for name in names if name not in own]
    if not unknown:
        return kept
    note = (
        f"labels: the data has {', '.join(map(repr, unknown))}, which the model does not know, "
        f"so a new model gets a new output layer for {', '.join(map(repr, names))}; "
        f"--labels base keeps to the model's own"
    )
    return LabelChoice(names, note)


def base_for(
    given: ModelFile,
    labels: Sequence[str] | None,
    seed: int,
    folder: FineTuningFolder,
    approvals: Approvals,
) -> ModelFile:
    """Return the base to train: ``given``, or with new labels one with a new output layer.

    The latter is kept in the folder, and approved, for it runs the code of a model that is.

    Raises:
        RunError: The folder holds another base.
        SettingsError: The labels cannot be used.
    """
    if labels is None:
        return given
    base = new_task(given, labels, seed)
    if not folder.started:
        write_model(base, folder.base)
    kept = read_model(folder.base) if folder.base.exists() else None
    if kept is None or kept.content_digest != base.content_digest:
        msg = f"{folder.path}: the run was started with other labels, another model or seed"
        raise RunError(f"{msg}; choose another --run")
    if not approvals.allows(kept.digest):
        approvals.add(kept, f"new labels on the approved {given.digest[:16]}")
    return kept


def own_labels(model: ModelFile) -> tuple[str, ...]:
    """Return the labels of a model, channel 1 first; none where its sources do not state them."""
    labels = model_labels(model) or {}
    return tuple(labels[channel] for channel in sorted(labels))


def check_labels(own: Sequence[str], cases: Sequence[CaseRef], data: DataFolder) -> None:
    """Refuse cases without masks, or without any of a model's own labels.

    Raises:
        DataError: Such a case was found; it is named.
    """
    for ref in cases:
        names = label_names(ref, data)
        if not names:
            msg = f"case {ref.name!r}: expected a label map or masks, got none; leave it out"
            raise DataError(msg)
        if own and not {_plain(name, own) for name in names} & set(own):
            msg = f"case {ref.name!r}: expected labels of the model, {sorted(own)}"
            raise DataError(f"{msg}, got {sorted(names)}")


def _lacking_note(lacking: Sequence[str]) -> str:
    """Return what becomes of the model's labels that the data does not know."""
    if not lacking:
        return ""
    return (
        f"labels: the data does not name {', '.join(map(repr, lacking))} of the model, so nothing "
        "is learned of it, and what is not drawn is not taken for background there"
    )


def _plain(name: str, own: Sequence[str]) -> str:
    """Return a label's name without its side, as Dafne's training functions read it."""
    return name[:-2] if name.endswith(("_L", "_R")) and name not in own else name
