"""The table of adaptation methods: what each trains on a network, chosen by name.

A method only chooses targets. Attaching, training, sending, averaging and folding are the
same for all of them, so a new row is a new method and nothing else has to change. It needs
neither TensorFlow nor the model's code.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from dafne_federated.core.errors import AdapterError
from dafne_federated.core.plan import Layer, Target, TargetKind, lora_targets, split_head


@dataclass(frozen=True)
class Choices:
    """What some methods let a person choose.

    Attributes:
        where: For ``lora``: ``all``, ``decoder`` or ``encoder``.
        last: For ``last-k``: how many layers.
    """

    where: str = "all"
    last: int = 2


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        trains: What it trains, in words for people.
        targets: Chooses what is trained; an empty answer means that there is nothing.
        head: Whether the whole head is trained, with what ``targets`` chooses.
    """

    trains: str
    targets: Callable[[Sequence[Layer], Choices], Iterable[Target]]
    head: bool = True


def method_parts(method: str) -> tuple[str, ...]:
    """Return the names that ``method`` joins by ``+``.

    Raises:
        AdapterError: A name is not in the table, or the names make no sense together.
    """
    parts = tuple(method.split("+"))
    for name in parts:
        if name not in METHODS:
            msg = f"no method {name!r}; there are {', '.join(METHODS)}, and several joined by '+'"
            raise AdapterError(msg)
    for one, other in combinations(parts, 2):
        reason = "it is the same twice" if one == other else None
        reason = reason or _CLASHES.get(frozenset((one, other)))
        if "full" in (one, other):
            reason = "'full' trains everything already"
        if reason:
            msg = f"{one!r} and {other!r} cannot be combined: {reason}"
            raise AdapterError(msg)
    return parts


def method_words(method: str) -> str:
    """Return in words for people what ``method`` trains.

    Raises:
        AdapterError: A name is not in the table, or the names make no sense together.
    """
    parts = [METHODS[name] for name in method_parts(method)]
    head = [] if any(part.head for part in parts) else ["the head's kernel stays"]
    return "; ".join([*(part.trains for part in parts), *head])


def plan_targets(
    method: str, layers: Sequence[Layer], choices: Choices | None = None
) -> tuple[Target, ...]:
    """Return what ``method`` trains on a network, in the order of the weight keys.

    Where several parts choose the same weight, a change of the whole array takes the place of
    a scale or a low-rank pair, which it contains.

    Args:
        method: A name of the table, or several joined by ``+``.
        layers: The network, in the order of its weights.
        choices: Choices for the methods that have some.

    Raises:
        AdapterError: A name is unknown, a part finds nothing to train on this network, or it
            adds nothing to the others.
    """
    parts = method_parts(method)
    found = {name: list(METHODS[name].targets(layers, choices or Choices())) for name in parts}
    for name, targets in found.items():
        if not targets:
            msg = f"method {name!r} finds nothing in this network: it trains {METHODS[name].trains}"
            raise AdapterError(msg)
    if any(METHODS[name].head for name in parts):
        _, head = split_head(layers)
        found["head"] = head.targets()
    everything = _union(found.values())
    for name in parts:
        rest = _union(targets for other, targets in found.items() if other != name)
        if name != "head" and len(parts) > 1 and rest == everything:
            others = "+".join(other for other in parts if other != name)
            msg = f"{name!r} adds nothing to {others!r} on this network; leave it out"
            raise AdapterError(msg)
    return tuple(everything[key] for key in sorted(everything))


def output_keys(
    layers: Iterable[Layer], targets: Iterable[Target], channels: int
) -> tuple[str, ...]:
    """Return the keys of targets that hold one column for each output channel.

    Args:
        layers: The network, in the order of its weights.
        targets: What is trained.
        channels: Output channels, background included.

    Returns:
        Kernel and bias of the output layer, as far as they are trained whole; none where that
        layer has other channels or does not hold them on the last axis.
    """
    _, head = split_head(layers)
    own = {key for key, shape in head.weights.values() if shape[-1:] == (channels,)}
    if head.kind not in ("conv", "dense") or len(own) < len(head.weights):
        return ()
    return tuple(target.key for target in targets if target.key in own and target.kind == "delta")


def frozen_share(layers: Iterable[Layer], targets: Iterable[Target]) -> float | None:
    """Return the share of a forward pass that lies before the first trained layer, 0 to 1.

    What lies there never changes, so its outputs can be computed once for each slice and kept.

    Returns:
        The share of the multiply-adds of all kernels; None where they are not known.
    """
    trained = {target.key for target in targets}
    before, total, frozen = 0, 0, True
    for layer in layers:
        frozen = frozen and trained.isdisjoint(key for key, _ in layer.weights.values())
        before += layer.work * frozen
        total += layer.work
    return before / total if total else None


def worth_keeping(share: float | None) -> bool:
    """Return whether a ``frozen_share`` is worth keeping its outputs; an unknown one is not.

    Below a tenth, reading the outputs from disk takes as long as computing them again.
    """
    return share is not None and share >= _WORTH_KEEPING


def _union(parts: Iterable[Iterable[Target]]) -> dict[str, Target]:
    union: dict[str, Target] = {}
    for target in (target for part in parts for target in part):
        other = union.get(target.key, target)
        if other.kind != target.kind and "delta" not in (other.kind, target.kind):
            msg = (
                f"weight {target.key} ({target.layer}) would change in two ways, as "
                f"{other.kind!r} and as {target.kind!r}, and neither contains the other"
            )
            raise AdapterError(msg)
        union[target.key] = other if other.kind == "delta" else target
    return union


def _head(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    _, head = split_head(layers)
    return head.targets()


def _last(layers: Sequence[Layer], choices: Choices) -> Iterable[Target]:
    body, head = split_head(layers)
    if choices.last > len(body) + 1:
        msg = f"last: expected at most the {len(body) + 1} layers with kernels, got {choices.last}"
        raise AdapterError(msg)
    return _whole([*body, head][-choices.last :])


def _decoder(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    body, _ = split_head(layers)
    return _whole(layer for layer in body if layer.decoder)


def _encoder(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    body, _ = split_head(layers)
    return _whole(layer for layer in body if not layer.decoder)


def _norm(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    return [target for layer in layers for target in layer.targets("gamma", "beta")]


def _bias(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    return [target for layer in layers for target in layer.targets("bias", "beta")]


def _ssf(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    """Choose a scale for each kernel and gamma, and a shift for each bias and beta.

    Features ``y`` become ``g y + h`` for each channel, after each convolution and
    normalisation. With ``g = 1 + s`` the kernel becomes ``(1 + s) W`` and the bias
    ``(1 + s) b + h``; what is trained is ``s`` and the whole change of the bias,
    ``d = s b + h``. That reaches exactly the same networks, each weight folds by itself, and
    the mean over sites is the same: ``s`` and ``d`` follow linearly from ``g`` and ``h``. A
    layer without a bias has only its scale.

    Source:
        SSF, https://arxiv.org/abs/2210.08823, which folds its scales and shifts likewise.
    """
    targets = []
    for layer in layers:
        if layer.kind in _SCALES:
            targets += layer.targets("kernel", kind=_SCALES[layer.kind])
            targets += layer.targets("bias")
        targets += layer.targets("gamma", kind="scale")
        targets += layer.targets("beta")
    return targets


def _lora(layers: Sequence[Layer], choices: Choices) -> Iterable[Target]:
    return lora_targets(layers, choices.where)


def _full(layers: Sequence[Layer], _choices: Choices) -> Iterable[Target]:
    return _whole(layers)


def _whole(layers: Iterable[Layer]) -> list[Target]:
    return [target for layer in layers for target in layer.targets()]


_WORTH_KEEPING = 0.1

_SCALES: dict[str, TargetKind] = {
    "conv": "scale",
    "dense": "scale",
    "conv-transpose": "scale-transpose",
    "depthwise": "scale-depthwise",
}

_CLASHES = {
    frozenset(("ssf", "lora")): "both change each kernel, one by a scale, one by a low-rank pair",
    frozenset(("ssf", "norm")): "'ssf' scales and shifts each normalisation already",
    frozenset(("ssf", "bias")): "'ssf' shifts each layer already",
}

# Sources: fine-tuning of encoder or decoder alone, https://arxiv.org/abs/2002.08438; norm,
# https://arxiv.org/abs/2003.00152; bias, https://arxiv.org/abs/2106.10199; ssf,
# https://arxiv.org/abs/2210.08823; lora, https://arxiv.org/abs/2106.09685, for convolutions
# https://arxiv.org/abs/2309.14859.
METHODS: dict[str, Method] = {
    "head": Method("the output layer", _head),
    "last-k": Method("the last k layers with kernels", _last),
    "decoder": Method("kernels and biases of the enlarging half", _decoder),
    "encoder": Method("kernels and biases of the shrinking half", _encoder, head=False),
    "norm": Method("scale and shift of the normalisations", _norm, head=False),
    "bias": Method("all biases and shifts", _bias, head=False),
    "ssf": Method("a scale and a shift for each layer, the head whole", _ssf),
    "lora": Method("low-rank updates of kernels, the head whole", _lora),
    "full": Method("every weight; batch statistics stay", _full),
}
