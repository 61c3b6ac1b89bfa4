"""The settings that a new site starts with, as text for people to edit."""

import json
from collections.abc import Sequence

from dafne_federated.core.dataset import DataFolder, label_names, split_persons
from dafne_federated.core.errors import DataError

_SHARES = (3.0, 1.0)  # persons that train, and that validate
_SPLIT_SEED = 1


def first_settings(name: str, coordinator: str, local_port: int, data: DataFolder) -> str:
    """Return a ``site.toml``.

    Persons are dealt to training and validation once; people can change the lists.

    Args:
        name: Name of the site.
        coordinator: ``HOST:PORT``.
        local_port: See ``Connection``.
        data: Its images; only cases with masks take part.

    Raises:
        DataError: No case has masks.
    """
    drawn = [ref for ref in data.cases if label_names(ref, data)]
    if not drawn:
        msg = f"{data.path.name!r}: expected cases with masks, got none"
        raise DataError(msg)
    training, validation = (
        [ref.name for ref in part] for part in split_persons(drawn, _SHARES, _SPLIT_SEED)
    )
    return f"""\
# A site of a dafne-federated federation. Changes count from the next message on; those under
# [connection] from the next 'site start'. Paths are relative to this file.

# The name under which the coordinator registered this site.
name = {_text(name)}

# Folder of images with masks, and the cases that take part: to train on, and to measure on.
# No person may be in both. Names of cases stay here.
data = {_text(str(data.path.resolve()))}
training = {_list(training)}
validation = {_list(validation)}

# Class as Dafne names it, such as "Thigh, Left"; empty for most models.
classification = ""

# Labels are matched by name. What a label of the model is called here, and which labels of the
# model were annotated, where the folder itself does not tell; the others are left out of the loss.
# annotated = ["left kidney"]
# label-names."left kidney" = "kidney_L"

# What this site agrees to: it takes part only with so many training cases, trains at most so
# many epochs a round, and works at most so many seconds on a message. What needs longer is
# refused, and nothing of it is kept or sent.
min-cases = 1
max-epochs = 100
# max-seconds = 3600

# In a federation that goes on: so many new training cases since it trained last are announced.
least-new-cases = 1

# Methods by which it trains ('dafne-federated methods' lists them); by default all.
# methods = ["lora", "norm", "bias"]

# Which numbers beside the update may leave: the Dice of each label on the cases to measure on;
# the loss of training; and where a run asks for them, numbers about all training slices together
# (means and variances of normalisations, pixels by label).
share-dice = true
share-loss = true
share-statistics = false

# Where each person is to be hidden by noise: the least noise that this site accepts (above 0 it
# trains in no other way), and the largest epsilon that all its runs together may spend.
# PRIVACY.md of this package says what that protects.
min-noise = 0.0
max-epsilon = 10.0

# Rank of its low-rank updates: less for few cases or a slow line. By default that of the run.
# rank = 2

# CPU threads (0 for all cores), device (auto, cpu or gpu), float32 or bfloat16.
threads = 0
device = "auto"
precision = "float32"

# Outputs of frozen layers are kept on disk, at most so many MiB.
prefix-cache = true
prefix-cache-mib = 8192

# Where things lie. The cache holds prepared images of patients: use an encrypted disk. Bases
# that nobody approved yet wait in the inbox to be looked at; without it they are refused unread.
cache = "cache"
approvals = "approved-models.json"
inbox = "inbox"

# Says how much the ledger in the cache must hold of what was spent with noise, so that a cache
# that got lost does not pass for one that spent nothing.
privacy-marker = "privacy-marker.json"

[connection]
coordinator = {_text(coordinator)}

# First of three ports that only this machine itself uses.
local-port = {local_port}
"""


def _list(names: Sequence[str]) -> str:
    lines = "".join(f"    {_text(name)},\n" for name in names)
    return f"[\n{lines}]" if names else "[]"


def _text(value: str) -> str:
    """Return a string as TOML writes it."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
