"""Causal attention in training with bfloat16 weights: a fused forward and backward pass."""

from __future__ import annotations

from typing import Any

from paddle import Tensor
from paddle.autograd import PyLayer

from ernie45.ops import custom


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, ends: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention that keeps nothing but its inputs, in bfloat16, for the backward pass.

    Operands of products are rounded to bfloat16; sums and softmax are float32.

    Args:
        query: [batch, tokens, heads, head_dim] float32.
        key, value: [batch, tokens, kv_heads, head_dim] float32; head h reads kv head h // (heads / kv_heads).
        scale: factor of the scores, 1 / sqrt(head_dim).
        ends: [batch, tokens] int64, for each key the first row that may no longer see it (0: none may, as for padding);
            None: all later rows may.

    Returns:
        Like query. A token that sees no key gets zeros.
    """
    return _CausalAttention.apply(query, key, value, ends, scale)


class _CausalAttention(PyLayer):
    """The fused passes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, scale: float) -> Tensor:
        ctx.scale = scale
        rounded = [custom.run("ernie45_narrow", x)[0] for x in (query, key, value)]
        ctx.save_for_backward(*rounded, ends)
        return custom.run("ernie45_causal_attention", *rounded, ends, scale)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, ends = ctx.saved_tensor()
        gradients = custom.run("ernie45_causal_attention_backward", query, key, value, ends, gradient, ctx.scale)
        return tuple(gradients) if ends is None else (*gradients, None)
