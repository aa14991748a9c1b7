"""Adapters on a model: putting them on, taking them out of the way, and merging them into its weights.

A `LoraWeight` stands in a layer under the name of the layer's weight and hides it: the layer multiplies by what it
finds there (`ops.linear`), and knows nothing of it. The weight itself stays a parameter (or packed) under its own name,
so that checkpoints of the model are what they were. A and B are parameters of the layer beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor, nn

from ernie45.errors import ErnieError
from ernie45.lora.config import DEFAULT_TARGETS, LoraConfig
from ernie45.lora.weight import LoraWeight, create_pair
from ernie45.models.layers import Linear
from ernie45.models.moe import ExpertBank
from ernie45.models.pretrained import PretrainedModel
from ernie45.ops.packed import PackedWeight
from ernie45.ops.weight_only import WeightOnly, WeightOnlyStack

STACKS = ("up_gate_proj", "down_proj")
A, B = "lora_A", "lora_B"


@dataclass(frozen=True)
class Place:
    """A weight that can have an adapter.

    Attributes:
        layer: whose weight it is.
        attribute: under which the layer finds it.
        modules: the published names of what it stands for: one, or one for each expert of a stack.
    """

    layer: nn.Layer
    attribute: str
    modules: list[str]

    @property
    def weight(self) -> Tensor | PackedWeight | LoraWeight:
        """What the layer multiplies by."""
        return getattr(self.layer, self.attribute)

    @property
    def prefix(self) -> str:
        """What the names of A and B begin with, where the layer has several weights."""
        return "" if self.attribute == "weight" else f"{self.attribute}_"


@dataclass(frozen=True)
class Adapter:
    """An adapter and its place."""

    place: Place
    weight: LoraWeight

    @property
    def active(self) -> bool:
        """Whether the layer multiplies by it."""
        return self.place.weight is self.weight

    def insert(self) -> None:
        """Lets the layer find it in the place of the weight."""
        vars(self.place.layer)[self.place.attribute] = self.weight  # comes before the parameters of a layer

    def withdraw(self) -> None:
        """Lets the layer find its own weight again."""
        if isinstance(self.weight.base, PackedWeight):
            vars(self.place.layer)[self.place.attribute] = self.weight.base
        else:
            vars(self.place.layer).pop(self.place.attribute, None)

    def remove(self) -> None:
        """Undoes `_adapter`."""
        self.withdraw()
        for name in (A, B):
            delattr(self.place.layer, self.place.prefix + name)


@dataclass
class Lora:
    """The adapters of one model, kept as its attribute `lora`.

    Attributes:
        config: how they were made.
        adapters: in the order of the model.
        trainable: the parameters of the model that were in training before.
        fused: parts of the model whose fused operator is switched off, which knows no adapters, and that operator.
        bases: while they are merged, copies of the weights as they were.
    """

    config: LoraConfig
    adapters: list[Adapter]
    trainable: list[Tensor]
    fused: list[tuple[nn.Layer, Any]] = field(default_factory=list)
    bases: list[Tensor] | None = None


def apply(
    model: PretrainedModel,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Iterable[str] | None = None,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
) -> list[str]:
    """Puts adapters (LoRA, arXiv 2106.09685) beside weights of a model, and freezes everything else.

    x W becomes x W + scale * dropout(x) A B with A [in, rank] random and B [rank, out] zero, both float32: the model
    computes what it did before. Every expert has its own pair. The weights may be float32, bfloat16 or packed (as
    `quantization="wint4"` gives them); a packed decoder runs layer by layer from then on. `model.save_pretrained`
    writes the model without its adapters, until they are merged.

    Args:
        rank: as above.
        alpha: scale is alpha / rank; None: 2 * rank, and 4 with rslora, as upstream has it in any case.
        targets: regular expressions for the published names of modules, such as `ernie.layers.0.self_attn.qkv_proj` or
            `ernie.layers.1.mlp.experts.3.down_proj`; one has to match the whole name, or all behind one of its dots.
            None: `DEFAULT_TARGETS`. Routers, embedding and heads never get an adapter.
        rslora: scale is alpha / sqrt(rank) (arXiv 2312.03732), which suits high ranks.
        dropout: probability with which an entry of an adapter's input is dropped in training.

    Returns:
        The published names of the modules with an adapter.

    Raises:
        ErnieError: an impossible value, a target that matches nothing or only some experts of a layer, or a model that
            has adapters already.
    """
    refuse_adapted(model)
    config = LoraConfig.of(rank, alpha, targets, rslora, dropout)
    places = list(candidates(model))
    for pattern in config.targets:
        matched = LoraConfig(1, 1, (pattern,)).matches
        if pattern not in DEFAULT_TARGETS and not any(matched(name) for place in places for name in place.modules):
            known = sorted({name.rsplit(".", 1)[1] for place in places for name in place.modules})
            raise ErnieError(f"lora: target {pattern!r} matches no module; their names end in {', '.join(known)}")
    return attach(model, config)


def attach(model: PretrainedModel, config: LoraConfig) -> list[str]:
    """See `apply`; the model has no adapters yet. Patterns that match nothing are no error as long as one does."""
    chosen = [place for place in candidates(model) if _is_chosen(place, config)]
    if not chosen:
        raise ErnieError(f"lora: no module of the model matches one of the targets {list(config.targets)}")
    if any(isinstance(place.weight, WeightOnly | WeightOnlyStack) for place in chosen):
        raise ErnieError("lora: on a GPU, weights of 8 and 4 bits are for inference; load the model with pack=False")
    trainable = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    for parameter in trainable:
        parameter.stop_gradient = True
    model.lora = Lora(config, [_adapter(place, config) for place in chosen], trainable)
    for adapter in model.lora.adapters:
        adapter.insert()
    _switch_off_fused(model)
    return [name for place in chosen for name in place.modules]


def refuse_adapted(model: PretrainedModel) -> None:
    """Raises an ErnieError if the model has adapters already."""
    if getattr(model, "lora", None) is not None:
        raise ErnieError("lora: the model has adapters already; call lora.remove(model) first, or merge them for good")


def candidates(model: PretrainedModel) -> Iterator[Place]:
    """Every linear weight and every stack of experts; the children of the model itself are heads and left out."""
    for name, layer in model.named_sublayers():
        if isinstance(layer, Linear) and "." in name:
            yield Place(layer, "weight", _modules(model, f"{name}.weight", layer.weight))
        elif isinstance(layer, ExpertBank):
            for stack in STACKS:
                yield Place(layer, stack, _modules(model, f"{name}.{stack}", getattr(layer, stack)))


def parameters(model: PretrainedModel) -> list[Tensor]:
    """A and B of every adapter: all that is to be trained."""
    return [tensor for adapter in of(model).adapters for tensor in (adapter.weight.a, adapter.weight.b)]


def parameter_groups(model: PretrainedModel, plus_ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups for an optimizer of Paddle in which every B learns `plus_ratio` times as fast as A.

    LoRA+ (arXiv 2402.12354), which recommends 16. The entry `learning_rate` of a group is a factor of the optimizer's
    rate, whatever schedule this follows.
    """
    adapters = of(model).adapters
    return [
        {"params": [adapter.weight.a for adapter in adapters], "learning_rate": 1.0},
        {"params": [adapter.weight.b for adapter in adapters], "learning_rate": plus_ratio},
    ]


@contextlib.contextmanager
def disabled(model: PretrainedModel) -> Iterator[None]:
    """Inside, the model computes without its adapters: the reference of DPO.

    Raises:
        ErnieError: there are no adapters, or they are merged.
    """
    lora = of(model)
    if lora.bases is not None:
        raise ErnieError("lora: the adapters are merged into the weights; call lora.unmerge(model) first")
    active = [adapter for adapter in lora.adapters if adapter.active]
    for adapter in active:
        adapter.withdraw()
    try:
        yield
    finally:
        for adapter in active:
            adapter.insert()


@paddle.no_grad()
def merge(model: PretrainedModel, keep_base: bool = True) -> None:
    """Adds the adapters to the weights, W += scale * A B, which then cost nothing more; see `unmerge`.

    Nothing is trained while they are merged.

    Args:
        keep_base: keep a copy of the weights for `unmerge`. Subtracting A B again would not give their bits back, in
            bfloat16 not by far. False: do without that memory; the model is then a plain one without adapters.

    Raises:
        ErnieError: they are merged already, or the weights are packed, which A B cannot be added to.
    """
    lora = of(model)
    if lora.bases is not None:
        raise ErnieError("lora: the adapters are merged already")
    if any(isinstance(adapter.weight.base, PackedWeight) for adapter in lora.adapters):
        raise ErnieError(
            'lora: packed weights cannot take up adapters; load the model with dtype="float32", then lora.load() the '
            "adapters and merge them there (save_pretrained can write another dtype)"
        )
    bases = [adapter.weight.tensor.clone() for adapter in lora.adapters] if keep_base else None
    for adapter in lora.adapters:
        adapter.weight.merge()
        adapter.withdraw()
    lora.bases = bases
    if not keep_base:
        remove(model)


@paddle.no_grad()
def unmerge(model: PretrainedModel) -> None:
    """Puts the weights back bit for bit and the adapters beside them again.

    Raises:
        ErnieError: the adapters are not merged.
    """
    lora = of(model)
    if lora.bases is None:
        raise ErnieError("lora: the adapters are not merged")
    for adapter, base in zip(lora.adapters, lora.bases, strict=True):
        adapter.weight.tensor.copy_(base, True)
        adapter.insert()
    lora.bases = None


def remove(model: PretrainedModel) -> None:
    """Takes the adapters off, which are lost: the model is what it was before `apply`.

    Adapters that are merged are unmerged first.
    """
    lora = of(model)
    if lora.bases is not None:
        unmerge(model)
    for adapter in lora.adapters:
        adapter.remove()
    for parameter in lora.trainable:
        parameter.stop_gradient = False
    for part, operator in lora.fused:
        part.fused = operator
    model.lora = None


def of(model: PretrainedModel) -> Lora:
    """The adapters of a model.

    Raises:
        ErnieError: it has none.
    """
    lora = getattr(model, "lora", None)
    if lora is None:
        raise ErnieError("lora: the model has no adapters; call lora.apply or lora.load first")
    return lora


def _modules(model: PretrainedModel, name: str, weight: Tensor | PackedWeight) -> list[str]:
    return [published.removesuffix(".weight") for published, _ in model.published({name: weight})]


def _is_chosen(place: Place, config: LoraConfig) -> bool:
    matched = [config.matches(name) for name in place.modules]
    if any(matched) and not all(matched):
        raise ErnieError(
            f"lora: the targets match {sum(matched)} of {len(matched)} experts, {place.modules[0]} to "
            f"{place.modules[-1]}; these get adapters together or not at all"
        )
    return all(matched)


def _adapter(place: Place, config: LoraConfig) -> Adapter:
    a, b = create_pair(place.layer, place.weight.shape, config.rank)
    place.layer.add_parameter(place.prefix + A, a)
    place.layer.add_parameter(place.prefix + B, b)
    return Adapter(place, LoraWeight(place.weight, a, b, config.scale, config.dropout, place.layer))


def _switch_off_fused(model: PretrainedModel) -> None:
    """The fused decoder has no gradient, not even for pictures; a tower keeps its operator if it has no adapters."""
    adapted = {id(adapter.place.layer) for adapter in model.lora.adapters}
    tower = getattr(model, "vision_model", None)
    parts = [model.ernie]
    if tower is not None and any(id(layer) in adapted for layer in tower.sublayers()):
        parts.append(tower)
    for part in parts:
        model.lora.fused.append((part, part.fused))
        part.fused = None
