"""The parts of a model that training treats apart: vision tower, adapter, vision experts, and all else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from paddle import Tensor

from ernie45.checkpoint.names import router_weight_name
from ernie45.errors import ErnieError
from ernie45.models.moe import MoE, MoEStatics

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel

TEXT = "text"
# Which parameters belong to a part; what matches none is text. A parameter's whole name has to match.
_NAMES = {
    "vision": re.compile(r"vision_model\..+"),
    "adapter": re.compile(r"adapter\..+"),
    "vision_experts": re.compile(r"ernie\.layers\.\d+\.mlp\.(experts\.[1-9]\d*\..+|gate\.weight_\d+)"),
}
PARTS = (*_NAMES, TEXT)


def parts(model: PretrainedModel) -> dict[str, list[Tensor]]:
    """Every parameter of a model once, by part: "vision", "adapter", "vision_experts" and "text".

    The vision experts come with their router. Text has all that pictures and words share as well: attention, norms,
    shared experts, embedding and head. Of a text model the other parts are empty.
    """
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        owner = next((part for part, pattern in _NAMES.items() if pattern.fullmatch(name)), TEXT)
        found[owner].append(parameter)
    return found


def freeze(model: PretrainedModel, names: str | Iterable[str]) -> int:
    """Takes parts of a model out of training, each of them alone; returns how many parameters that are.

    The correction bias is not among them: no gradient ever trains it, and whether it moves is up to the caller of
    `losses.update_correction_bias`.

    Args:
        names: one or more of "vision", "adapter", "vision_experts", "text".

    Raises:
        ErnieError: there is no such part, the model does not have it, or its weights are packed for inference.
    """
    return _set_frozen(model, names, frozen=True)


def unfreeze(model: PretrainedModel, names: str | Iterable[str]) -> int:
    """Undoes `freeze`; arguments, result and errors are those of it."""
    return _set_frozen(model, names, frozen=False)


def router_weights(model: PretrainedModel) -> dict[int, list[Tensor]]:
    """By decoder layer with routed experts, the router weight [hidden_size, experts] of each bank."""
    layers = {index: layer.mlp for index, layer in enumerate(model.ernie.layers) if isinstance(layer.mlp, MoE)}
    return {
        index: [getattr(mlp.gate, router_weight_name(bank)) for bank in range(len(mlp.config.banks))]
        for index, mlp in layers.items()
    }


def _set_frozen(model: PretrainedModel, names: str | Iterable[str], frozen: bool) -> int:
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    available = parts(model)
    for name in chosen:
        if name not in available:
            raise ErnieError(f"parts: there is no part {name!r}; the parts of a model are {', '.join(PARTS)}")
        if not available[name]:
            owned = ", ".join(part for part in PARTS if available[part])
            raise ErnieError(f"parts: this {type(model).__name__} has no part {name!r}; it has {owned}")
    if chosen and model.is_packed:
        raise ErnieError('parts: the weights are packed for inference; load the model with dtype="float32"')
    biases = {id(bias) for layer in model.sublayers() if isinstance(layer, MoEStatics) for bias in layer.parameters()}
    trained = [parameter for name in chosen for parameter in available[name] if id(parameter) not in biases]
    for parameter in trained:
        parameter.stop_gradient = frozen
    return len(trained)
