"""Recomputation: trading a second forward pass for the memory of activations (arXiv 1604.06174), put on from outside.

A layer that is recomputed keeps its input alone. In the backward pass it runs again, with the same random numbers, and
only then are its inner activations there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie45.errors import ErnieError
from ernie45.models.decoder import DecoderLayer
from ernie45.models.layers import MLP, Attention
from ernie45.models.moe import MoE, Routing
from ernie45.models.vision import VisionBlock

# What each granularity recomputes; the names are upstream's, except "mlp".
LAYERS: dict[str, tuple[type[nn.Layer], ...]] = {
    "full": (DecoderLayer, VisionBlock),
    "full_attn": (Attention,),
    "mlp": (MLP, MoE),
}
_TENSORS = ("logits", "probabilities", "indices", "weights")
assert {field.name for field in fields(Routing)} == {"layer", "bank", *_TENSORS}


def recompute(model: nn.Layer, granularity: str) -> int:
    """Lets layers of a model recompute their activations while it is trained; returns how many layers that are.

    Args:
        granularity: "full": every block of decoder and vision tower; "full_attn": the decoder's attention;
            "mlp": its feed-forward parts, mixtures of experts included.

    Raises:
        ErnieError: there is no such granularity.
    """
    if granularity not in LAYERS:
        raise ErnieError(f"recompute_granularity: expected {', '.join(LAYERS)}, found {granularity!r}")
    chosen = list(_outermost(model, LAYERS[granularity]))
    for layer in chosen:
        layer.forward = _recomputing(layer, layer.forward)
    return len(chosen)


def keep_activations(model: nn.Layer) -> None:
    """Undoes `recompute`."""
    for layer in model.sublayers():
        layer.__dict__.pop("forward", None)


def _outermost(layer: nn.Layer, kinds: tuple[type[nn.Layer], ...]) -> Iterator[nn.Layer]:
    for child in layer.children():
        if isinstance(child, kinds):
            yield child
        else:
            yield from _outermost(child, kinds)


def _recomputing(layer: nn.Layer, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    routes = isinstance(layer, DecoderLayer | MoE)

    def run(x: Tensor, *rest: Any) -> Tensor:
        if not layer.training or not paddle.is_grad_enabled():
            return forward(x, *rest)
        # What a router notes has a gradient too, so it comes out as further results instead of by the way.
        notes = next((value for value in rest if routes and isinstance(value, list)), None)
        places: list[tuple[int, int]] = []

        def again(x: Tensor) -> tuple[Tensor, ...]:
            noted: list[Routing] = []
            y = forward(x, *(noted if value is notes and notes is not None else value for value in rest))
            places[:] = [(note.layer, note.bank) for note in noted]
            return (y, *(getattr(note, name) for note in noted for name in _TENSORS))

        if x.stop_gradient:  # as below frozen layers; without a differentiable input there would be no backward pass
            x = x.detach()
            x.stop_gradient = False
        y, *tensors = _Recomputed.apply(x, again)
        if notes is not None:
            groups = zip(*[iter(tensors)] * len(_TENSORS), strict=True)
            notes.extend(Routing(*place, *group) for place, group in zip(places, groups, strict=True))
        return y

    return run


class _Recomputed(PyLayer):
    """Runs a function without keeping what its backward pass needs, and runs it again when that is wanted."""

    @staticmethod
    def forward(ctx: PyLayer, x: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        ctx.function, ctx.random = function, paddle.get_rng_state()
        ctx.save_for_backward(x)
        with paddle.no_grad():
            results = function(x)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: PyLayer, *gradients: Tensor | None) -> Tensor | None:
        (saved,) = ctx.saved_tensor()
        x = saved.detach()
        x.stop_gradient = saved.stop_gradient
        random = paddle.get_rng_state()
        paddle.set_rng_state(ctx.random)
        with paddle.enable_grad():
            results = ctx.function(x)
        paddle.set_rng_state(random)
        wanted = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and not r.stop_gradient]
        paddle.autograd.backward([result for result, _ in wanted], [gradient for _, gradient in wanted])
        return x.grad
