"""Start a run: from a base and settings to a run folder with its plan."""

import time
import uuid
from pathlib import Path

from dafne_federated.core.batch_statistics import statistic_targets
from dafne_federated.core.methods import Choices, output_keys, plan_targets
from dafne_federated.core.model_file import ModelFile
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.network_layers import describe_layers
from dafne_federated.core.plan import AdaptationPlan
from dafne_federated.core.run_folder import RunFolder, RunInfo
from dafne_federated.core.settings import RunSettings
from dafne_federated.core.suffix_network import without_skips
from dafne_federated.core.versions import versions


def make_plan(model: RunningModel, settings: RunSettings) -> AdaptationPlan:
    """Return the plan that ``settings`` ask for on ``model``.

    Low-rank pairs leave out the input channels of frozen skip connections, so that what comes
    from there is constant and need not be computed in every step.

    Raises:
        AdapterError: The network has nothing that fits, or the methods do not combine on it,
            or statistics are to be pooled and it has none that can be.
    """
    layers = describe_layers(model.network)
    choices = Choices(where=settings.layers, last=settings.last)
    targets = without_skips(model.network, plan_targets(settings.method, layers, choices))
    if settings.statistics == "pooled":
        statistics = statistic_targets(model.network)
        targets = tuple(sorted((*targets, *statistics), key=lambda target: target.key))
    return AdaptationPlan(
        base_digest=model.file.digest,
        method=settings.method,
        rank=settings.rank,
        max_rank=settings.max_rank,
        scale=settings.scale,
        labels=model.labels,
        targets=targets,
        output=output_keys(layers, targets, len(model.labels) + 1),
    )


def start_run(
    path: Path,
    base: Path,
    model: ModelFile,
    plan: AdaptationPlan,
    settings: RunSettings,
    command: str,
) -> RunFolder:
    """Make the folder of a new run.

    Args:
        path: The folder.
        base: File of the base; copied.
        model: Its content.
        plan: What is trained.
        settings: How.
        command: What a person typed.

    Raises:
        RunError: There is a run in ``path`` already.
    """
    info = RunInfo(
        run=uuid.uuid4().hex,
        created=int(time.time()),
        base_digest=model.digest,
        base_name=str(model.metadata.get("model_name") or base.stem),
        plan_digest=plan.digest,
        settings=settings,
        versions=versions(),
        command=command,
    )
    return RunFolder.create(path, info, plan, base.read_bytes())
