"""A base with a state folded in: a newer version of the same family, with its name and date."""

from dataclasses import replace

from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.state import State, fold


def adapted_model(
    base: ModelFile, plan: AdaptationPlan, state: State, timestamp_id: int
) -> ModelFile:
    """Return ``base`` with ``state`` folded in, as a newer version of the same family."""
    return replace(
        base,
        digest="",
        weights=fold(base.weights, plan, state),
        timestamp_id=max(timestamp_id, base.timestamp_id + 1),
    )


def release_name(base: ModelFile, created: int) -> str:
    """Return ``Name_timestamp``; Dafne takes what is before the first ``_`` as the name."""
    name = str(base.metadata.get("model_name") or "Model").replace("_", "-")
    safe = "".join(c for c in name if c.isalnum() or c in " -()").strip() or "Model"
    return f"{safe}_{max(created, base.timestamp_id + 1)}"
