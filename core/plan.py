"""The adaptation plan: what is trained on a base model, named by weight key.

The coordinator makes one plan per run and sends it once; every later message carries its
digest. A plan is data: it can be checked, shown and folded without the model's code.
"""

import json
import math
from collections.abc import Iterable
from itertools import zip_longest
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dafne_federated.core.errors import AdapterError, MessageError, first_fault
from dafne_federated.core.files import sha256

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
WeightKey = Annotated[str, Field(pattern=r"^[0-9]{4}$")]
LowRankKind = Literal["conv", "conv-transpose", "dense"]
ScaleKind = Literal["scale", "scale-transpose", "scale-depthwise"]
WireType = Literal["float32", "float16"]  # how the values of a state travel
StatisticKind = Literal["mean", "variance"]
TargetKind = LowRankKind | ScaleKind | Literal["delta"] | StatisticKind


class Target(BaseModel):
    """One weight array that a plan changes.

    Attributes:
        key: Weight key of the array in the base model.
        layer: Layer name, for people only; names differ from build to build.
        kind: How it changes. ``conv``, ``conv-transpose`` and ``dense`` get a low-rank pair;
            ``delta`` adds an array of the same shape; ``scale``, ``scale-transpose`` and
            ``scale-depthwise`` multiply by ``1 + s``, one ``s`` for each output channel.
            ``mean`` and ``variance`` are stored statistics of a normalisation: an array of the
            same shape is added, as for ``delta``, but it is set once and never trained.
        shape: Shape of the weight: (window.., in, out) for ``conv``, (window.., out, in) for
            ``conv-transpose``, (in, out) for ``dense``; output channels last for ``scale``,
            last but one for ``scale-transpose``, and (.., in, out of each in) for
            ``scale-depthwise``.
        inputs: Input channels that a low-rank pair covers, the first and one past the last;
            None for all. The others keep the base's kernel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: WeightKey
    layer: str = Field(max_length=200)
    kind: TargetKind
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(max_length=6)
    inputs: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _enough_axes(self) -> Self:
        least = {"delta": 0, "scale": 1, "mean": 1, "variance": 1}.get(self.kind, 2)
        if len(self.shape) < least:
            msg = f"{self.kind}: expected a shape of at least {least} axes, got {self.shape}"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _covers_channels(self) -> Self:
        if self.inputs is None:
            return self
        first, end = self.inputs
        if not self.low_rank or not 0 <= first < end <= self.shape[self._input_axis]:
            msg = f"{self.kind} of shape {self.shape}: cannot cover input channels {self.inputs}"
            raise ValueError(msg)
        return self

    @property
    def low_rank(self) -> bool:
        """Whether the change is a pair ``a``, ``b``, whose mean is not the mean of its parts."""
        return self.kind in get_args(LowRankKind)

    @property
    def trained(self) -> bool:
        """Whether training changes it; stored statistics are set once for the whole run."""
        return self.kind not in get_args(StatisticKind)

    @property
    def covered(self) -> tuple[int, ...]:
        """Shape of the part of the kernel that a low-rank pair changes."""
        return tuple(n - sum(pair) for n, pair in zip(self.shape, self.padding(), strict=True))

    def padding(self) -> list[tuple[int, int]]:
        """Return how many zeros stand before and behind the covered part, for each axis."""
        padding = [(0, 0)] * len(self.shape)
        if self.inputs is not None:
            first, end = self.inputs
            padding[self._input_axis] = (first, self.shape[self._input_axis] - end)
        return padding

    @property
    def _input_axis(self) -> int:
        return -1 if self.kind == "conv-transpose" else -2

    def arrays(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of the state arrays of this target.

        A ``scale`` is shaped so that ``weight * (1 + scale)`` needs no further axes.

        Source:
            Scale and shift of features, https://arxiv.org/abs/2210.08823: what multiplies an
            output channel can as well multiply the weights that lead to it.
        """
        match self.kind:
            case "delta" | "mean" | "variance":
                return {"delta": self.shape}
            case "scale":
                return {"scale": self.shape[-1:]}
            case "scale-transpose":
                return {"scale": (self.shape[-2], 1)}
            case "scale-depthwise":
                return {"scale": self.shape[-2:]}
        a, b = self.pair_shapes(rank)
        return {"a": a, "b": b}

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of ``a`` and ``b`` at ``rank``.

        ``conv``: a k x k convolution to ``rank`` channels, then 1 x 1, so that ``a @ b`` is the
        kernel flattened to (window * in, out). ``conv-transpose``: 1 x 1 to ``rank`` channels,
        then the transposed convolution, so that ``a @ b`` is (in, window * out).

        Source:
            The convolution form of LoRA in https://arxiv.org/abs/2309.14859 (LoCon).
        """
        if self.kind == "conv-transpose":
            *window, cout, cin = self.covered
            return (cin, rank), (rank, *window, cout)
        *left, cout = self.covered
        return (*left, rank), (rank, cout)


class AdaptationPlan(BaseModel):
    """What is trained on which base model.

    Attributes:
        base_digest: SHA-256 of the base ``.model`` file.
        method: Name of the adaptation method that chose the targets.
        rank: Rank of low-rank pairs unless a site chooses another one within the bound.
        max_rank: Largest rank that is accepted from anybody.
        scale: The update of a kernel is ``scale * a @ b``, whatever the rank.
        labels: Label names by output channel, channel 1 first; channel 0 is background.
        targets: What changes, in the order of the weight keys.
        output: Weight keys of the output layer, where its last axis is the output channels: what
            belongs to one label alone. Empty in plans from before this was known, and where the
            output layer is of another form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_digest: Sha256
    method: str = Field(max_length=40)
    rank: int = Field(ge=1, le=256)
    max_rank: int = Field(ge=1, le=256)
    scale: float = Field(gt=0, le=100)
    labels: tuple[Annotated[str, Field(max_length=200)], ...] = Field(min_length=1, max_length=255)
    targets: tuple[Target, ...] = Field(min_length=1, max_length=9999)
    output: tuple[WeightKey, ...] = Field(default=(), max_length=10)

    @model_validator(mode="after")
    def _output_has_a_column_for_each_channel(self) -> Self:
        channels = len(self.labels) + 1
        for target in self.targets:
            whole = target.kind == "delta" and target.shape[-1:] == (channels,)
            if target.key in self.output and not whole:
                msg = (
                    f"output: expected whole arrays with {channels} channels last, got "
                    f"{target.kind} of shape {target.shape} for {target.key}"
                )
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _statistics_come_in_pairs(self) -> Self:
        for mean, variance in zip_longest(*self._statistics()):
            kinds = tuple(target.kind if target else "nothing" for target in (mean, variance))
            if kinds != ("mean", "variance") or mean.shape != variance.shape:
                msg = f"statistics: expected a mean and a variance of one shape, got {kinds}"
                raise ValueError(msg)
        return self

    @property
    def normalisations(self) -> tuple[tuple[Target, Target], ...]:
        """The stored mean and variance of each normalisation whose statistics are set."""
        return tuple(zip(*self._statistics(), strict=True))

    def statistics_shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of the state arrays of the first ``count`` normalisations."""
        first = (target for pair in self.normalisations[:count] for target in pair)
        return {f"{target.key}/delta": target.shape for target in first}

    def _statistics(self) -> tuple[list[Target], list[Target]]:
        statistics = [target for target in self.targets if not target.trained]
        return statistics[::2], statistics[1::2]

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return sha256(self.to_json().encode())

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no spaces, no ``output`` that is empty."""
        left_out = set() if self.output else {"output"}  # older plans keep their digest
        content = self.model_dump(mode="json", exclude=left_out)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read and check a plan.

        Raises:
            MessageError: A field is missing, unknown or out of range.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            msg = f"adaptation plan: {first_fault(error)}"
            raise MessageError(msg) from None

    def state_shapes(
        self, rank: int | None = None, trained: bool | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of every state array at ``rank`` (default: the plan's own).

        With ``trained`` only of those that training changes, or of the others.
        """
        return {
            f"{target.key}/{name}": shape
            for target in self.targets
            if trained is None or target.trained == trained
            for name, shape in target.arrays(rank or self.rank).items()
        }

    @property
    def parameters(self) -> int:
        """Values that are trained, at the plan's rank."""
        return sum(math.prod(shape) for shape in self.state_shapes(trained=True).values())

    @property
    def wire_bytes(self) -> int:
        """Bytes of a state's values in float32: what travels each way in a round."""
        return 4 * sum(math.prod(shape) for shape in self.state_shapes().values())


class Layer(BaseModel):
    """One layer of a base model as the planner sees it.

    Attributes:
        name: Layer name, for people.
        kind: ``conv``, ``conv-transpose``, ``dense``, ``depthwise``, ``norm`` or ``other``.
        weights: Weight key and shape by role (``kernel``, ``bias``, ``gamma``, ``beta``) of what
            training may change; statistics are not among them.
        depth: Position in the network, 0 for the first layer with weights.
        decoder: Whether the layer lies behind the first one that enlarges: a transposed
            convolution or an upsampling.
        refused: Why no low-rank pair fits the layer, in words; empty if one does.
        work: Multiply-adds for one input; 0 where they are not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["conv", "conv-transpose", "dense", "depthwise", "norm", "other"]
    weights: dict[str, tuple[str, tuple[int, ...]]]
    depth: int
    decoder: bool
    refused: str = ""
    work: int = 0

    def targets(self, *chosen: str, kind: TargetKind = "delta") -> list[Target]:
        """Return targets of one kind for the weights of the chosen roles, or for all."""
        return [
            Target(key=key, layer=self.name, kind=kind, shape=shape)
            for role, (key, shape) in self.weights.items()
            if not chosen or role in chosen
        ]


LAYER_CHOICES = ("all", "decoder", "encoder")


def split_head(layers: Iterable[Layer]) -> tuple[list[Layer], Layer]:
    """Return the layers with kernels, without the last one, and the last one: the head.

    Raises:
        AdapterError: No layer has a kernel.
    """
    with_kernel = [layer for layer in layers if any("kernel" in role for role in layer.weights)]
    if not with_kernel:
        msg = "the network has no layer with a kernel, so there is nothing to adapt"
        raise AdapterError(msg)
    return with_kernel[:-1], with_kernel[-1]


def lora_targets(layers: Iterable[Layer], where: str = "all") -> tuple[Target, ...]:
    """Return low-rank targets for the chosen kernels, and the whole last layer.

    The last layer with a kernel is the head: it is small, so it is trained whole, kernel and
    bias.

    Args:
        layers: The network, in the order of its weights.
        where: ``all``, ``decoder`` (behind the first layer that enlarges) or ``encoder``.

    Raises:
        AdapterError: ``where`` is unknown or chooses nothing that can be adapted.
    """
    if where not in LAYER_CHOICES:
        msg = f"layers: expected one of {', '.join(LAYER_CHOICES)}, got {where!r}"
        raise AdapterError(msg)
    body, head = split_head(layers)
    targets = []
    for layer in body:
        chosen = where == "all" or layer.decoder == (where == "decoder")
        kind = layer.kind
        if chosen and kind in ("conv", "conv-transpose", "dense") and not layer.refused:
            targets += layer.targets("kernel", kind=kind)
    if body and not targets:
        reasons = sorted({layer.refused for layer in body if layer.refused})
        msg = f"no layer among {where!r} can take a low-rank update; {'; '.join(reasons)}"
        raise AdapterError(msg)
    return tuple(sorted(targets + head.targets(), key=lambda target: target.key))
