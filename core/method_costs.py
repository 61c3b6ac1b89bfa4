"""What each adaptation method costs on a model and a machine, and which one to take."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dafne_federated.core.dry_run import DryRun
from dafne_federated.core.errors import AdapterError
from dafne_federated.core.methods import (
    METHODS,
    frozen_share,
    method_parts,
    method_words,
    worth_keeping,
)
from dafne_federated.core.model_runtime import RunningModel
from dafne_federated.core.network_layers import describe_layers
from dafne_federated.core.new_run import make_plan
from dafne_federated.core.plan import AdaptationPlan, Layer
from dafne_federated.core.settings import RunSettings, read_settings

# What is recommended leaves a fifth of the memory to others, and ends an epoch within five
# minutes: the 20 epochs that a run has by default then end within two hours.
MOST_MEMORY = 0.8
LONGEST_EPOCH_S = 300.0
# The first that fits is recommended. Low-rank updates come first for their results on few
# images, then what is cheaper. Source: https://arxiv.org/abs/2402.04964 for segmentation.
PREFERRED = ("lora", "lora --layers decoder", "ssf", "head")


@dataclass(frozen=True)
class Cost:
    """One method on one model.

    Attributes:
        method: As other commands take it, behind ``--method``.
        trains: What it trains, in words.
        refused: Why it does not fit this model; empty if it does.
        parameters: Values that are trained and travel each way in a round.
        bytes: Their size in float32.
        share: ``parameters`` as a share of all values of the model.
        frozen: Share of the forward work before the first trained layer; None if unknown.
        cacheable: Whether so much lies there that its outputs are worth keeping.
        epoch_seconds: An epoch on this machine; None if it was not measured.
        peak_mib: The most memory that a process had that trains so, in MiB.
        training_mib: How much of it came on top of the loaded model.
        failed: Why the dry run did not succeed; empty if it did.
    """

    method: str
    trains: str
    refused: str = ""
    parameters: int = 0
    bytes: int = 0
    share: float = 0.0
    frozen: float | None = None
    cacheable: bool = False
    epoch_seconds: float | None = None
    peak_mib: float | None = None
    training_mib: float | None = None
    failed: str = ""

    def measured(self, run: DryRun, slices: int, batch_size: int) -> "Cost":
        """Return this cost with what a dry run says of an epoch.

        Slices that do not fill a last batch wait for the next epoch, as in training.
        """
        steps = max(slices // batch_size, 1)
        training = None
        if run.peak_mib is not None and run.start_mib is not None:
            training = run.peak_mib - run.start_mib
        return replace(
            self,
            epoch_seconds=steps * run.step_seconds,
            peak_mib=run.peak_mib,
            training_mib=training,
        )


def usual_settings(settings: RunSettings) -> list[RunSettings]:
    """Return settings for each method of the table, and for what ``lora`` lets one choose."""
    wanted: list[dict[str, str]] = []
    for name in METHODS:
        wanted.append({"method": name})
        if name == "lora":
            wanted += [{"method": name, "layers": "decoder"}, {"method": "lora+norm"}]
    return [read_settings(None, **(settings.model_dump() | one)) for one in wanted]


def planned_cost(model: RunningModel, settings: RunSettings) -> tuple[Cost, AdaptationPlan | None]:
    """Return what is known without training: sizes and shares, and the plan if there is one."""
    parts = method_parts(settings.method)
    flags = settings.method
    if "lora" in parts and settings.layers != "all":
        flags += f" --layers {settings.layers}"
    if "last-k" in parts:
        flags += f" --last {settings.last}"
    cost = Cost(method=flags, trains=method_words(settings.method))
    try:
        plan = make_plan(model, settings)
    except AdapterError as error:
        return replace(cost, refused=str(error)), None
    frozen = frozen_share(describe_layers(model.network), plan.targets)
    cost = replace(
        cost,
        parameters=plan.parameters,
        bytes=plan.wire_bytes,
        share=plan.parameters / model.file.parameters,
        frozen=frozen,
        cacheable=worth_keeping(frozen),
    )
    return cost, plan


def left_out(layers: Iterable[Layer]) -> list[str]:
    """Return in words which layers with kernels ``lora`` leaves as they are."""
    reasons = Counter(
        layer.refused
        for layer in layers
        if layer.refused and any("kernel" in role for role in layer.weights)
    )
    return [
        f"lora leaves {count} layer{'s' * (count > 1)} as {'they are' if count > 1 else 'it is'}: "
        f"{reason}."
        for reason, count in sorted(reasons.items())
    ]


def recommend(costs: Sequence[Cost], memory_mib: float | None) -> str:
    """Return one sentence that says which method to take on this machine.

    It is the first of lora, lora in the decoder, ssf and head whose process stays below four
    fifths of the machine's memory and whose epoch ends within five minutes; if none does, the
    fastest of all that memory allows. Where lora would train more than half of the values of
    the model it saves nothing, so full comes first. Without a dry run only the sizes count.

    Args:
        costs: What is known of each method.
        memory_mib: Memory of the machine in MiB, None if unknown.
    """
    limit = None if memory_mib is None else MOST_MEMORY * memory_mib
    possible = {
        cost.method: cost
        for cost in costs
        if not cost.refused
        and not cost.failed
        and (limit is None or cost.peak_mib is None or cost.peak_mib <= limit)
    }
    if not possible:
        return "No method fits this model and the memory of this machine."
    order = list(PREFERRED)
    if "lora" in possible and possible["lora"].share > 0.5:
        order.insert(0, "full")
    preferred = [possible[name] for name in order if name in possible]
    quick = [cost for cost in preferred if (cost.epoch_seconds or 0.0) <= LONGEST_EPOCH_S]
    fastest = min(possible.values(), key=lambda cost: cost.epoch_seconds or 0.0)
    chosen = quick[0] if quick else fastest
    facts = [f"{chosen.parameters:,} values", f"{chosen.bytes / 1e6:.3g} MB each way"]
    if chosen.epoch_seconds is None:
        facts.append("time and memory not measured")
    else:
        facts.append(f"{chosen.epoch_seconds:.3g} s an epoch")
    if chosen.peak_mib is not None:
        facts.append(f"at most {chosen.peak_mib:,.0f} MiB of memory")
    why = "the first that fits" if quick else "the fastest that memory allows"
    return f"Recommended here: --method {chosen.method}, {why} ({', '.join(facts)})."
