"""The adaptation plan: what is trained on a base model, named by weight key.

The coordinator makes one plan per run and sends it once; every later message carries its
digest. A plan is data: it can be checked, shown and folded without the model's code.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dafne_federated.core.errors import AdapterError, MessageError
from dafne_federated.core.files import sha256

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
WeightKey = Annotated[str, Field(pattern=r"^[0-9]{4}$")]
LowRankKind = Literal["conv", "conv-transpose", "dense"]
TargetKind = Literal["conv", "conv-transpose", "dense", "delta"]


class Target(BaseModel):
    """One weight array that a plan changes.

    Attributes:
        key: Weight key of the array in the base model.
        layer: Layer name, for people only; names differ from build to build.
        kind: How it changes. ``conv``, ``conv-transpose`` and ``dense`` get a low-rank pair;
            ``delta`` adds an array of the same shape.
        shape: Shape of the weight: (window.., in, out) for ``conv``, (window.., out, in) for
            ``conv-transpose``, (in, out) for ``dense``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: WeightKey
    layer: str = Field(max_length=200)
    kind: TargetKind
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(max_length=6)

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of ``a`` and ``b`` at ``rank``.

        ``conv``: a k x k convolution to ``rank`` channels, then 1 x 1, so that ``a @ b`` is the
        kernel flattened to (window * in, out). ``conv-transpose``: 1 x 1 to ``rank`` channels,
        then the transposed convolution, so that ``a @ b`` is (in, window * out).

        Source:
            The convolution form of LoRA in https://arxiv.org/abs/2309.14859 (LoCon).
        """
        if self.kind == "conv-transpose":
            *window, cout, cin = self.shape
            return (cin, rank), (rank, *window, cout)
        *left, cout = self.shape
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base_digest: Sha256
    method: str = Field(max_length=40)
    rank: int = Field(ge=1, le=256)
    max_rank: int = Field(ge=1, le=256)
    scale: float = Field(gt=0, le=100)
    labels: tuple[Annotated[str, Field(max_length=200)], ...] = Field(min_length=1, max_length=255)
    targets: tuple[Target, ...] = Field(min_length=1, max_length=9999)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return sha256(self.to_json().encode())

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read and check a plan.

        Raises:
            MessageError: A field is missing, unknown or out of range.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            msg = f"adaptation plan: {field}: {first['msg']}"
            raise MessageError(msg) from None

    def state_shapes(self, rank: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return the shape of every state array at ``rank`` (default: the plan's own)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for target in self.targets:
            if target.kind == "delta":
                shapes[f"{target.key}/delta"] = target.shape
            else:
                a, b = target.pair_shapes(rank or self.rank)
                shapes |= {f"{target.key}/a": a, f"{target.key}/b": b}
        return shapes


class Layer(BaseModel):
    """One layer of a base model as the planner sees it.

    Attributes:
        name: Layer name, for people.
        kind: ``conv``, ``conv-transpose``, ``dense``, ``norm`` or ``other``.
        weights: Weight key and shape by role (``kernel``, ``bias``, ``gamma``, ``beta``).
        depth: Position in the network, 0 for the first layer with weights.
        decoder: Whether the layer lies behind the first transposed convolution.
        refused: Why no low-rank pair fits the layer, in words; empty if one does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["conv", "conv-transpose", "dense", "norm", "other"]
    weights: dict[str, tuple[str, tuple[int, ...]]]
    depth: int
    decoder: bool
    refused: str = ""


LAYER_CHOICES = ("all", "decoder", "encoder")


def lora_targets(layers: Iterable[Layer], where: str = "all") -> tuple[Target, ...]:
    """Return low-rank targets for the chosen kernels, and the whole last layer.

    The last layer with a kernel is the head: it is small, so it is trained whole, kernel and
    bias.

    Args:
        layers: The network, in the order of its weights.
        where: ``all``, ``decoder`` (behind the first transposed convolution) or ``encoder``.

    Raises:
        AdapterError: ``where`` is unknown or chooses nothing that can be adapted.
    """
    if where not in LAYER_CHOICES:
        msg = f"layers: expected one of {', '.join(LAYER_CHOICES)}, got {where!r}"
        raise AdapterError(msg)
    with_kernel = [layer for layer in layers if "kernel" in layer.weights]
    if not with_kernel:
        msg = "the network has no layer with a kernel, so there is nothing to adapt"
        raise AdapterError(msg)
    *body, head = with_kernel
    targets = []
    for layer in body:
        chosen = where == "all" or layer.decoder == (where == "decoder")
        if chosen and layer.kind in ("conv", "conv-transpose", "dense") and not layer.refused:
            key, shape = layer.weights["kernel"]
            targets.append(Target(key=key, layer=layer.name, kind=layer.kind, shape=shape))
    if body and not targets:
        reasons = sorted({layer.refused for layer in body if layer.refused})
        msg = f"no layer among {where!r} can take a low-rank update; {'; '.join(reasons)}"
        raise AdapterError(msg)
    targets += [
        Target(key=key, layer=head.name, kind="delta", shape=shape)
        for key, shape in head.weights.values()
    ]
    return tuple(sorted(targets, key=lambda target: target.key))
