"""Attention over the key/value cache: the fused operator where there is one, else the definition."""

from __future__ import annotations

import paddle
from paddle import Tensor

from ernie45.ops import custom, reference


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, first: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention of new tokens on a cache that holds them already.

    The fused operator takes caches in bfloat16 and rounds queries and probabilities to it; it works in blocks of keys
    with a running softmax (arXiv 2205.14135).

    Args:
        query: [batch, new, heads, head_dim]
        keys, values: [batch, capacity, kv_heads, head_dim]; head h reads kv head h // (heads / kv_heads).
        lengths: [batch] int64, keys in the cache of each row, the new ones included.
        scale: factor of the scores, 1 / sqrt(head_dim).
        first: [batch] int64, keys in front of it are padding; None: 0.

    Returns:
        Like query. A token that sees no key gets zeros.
    """
    first = paddle.zeros_like(lengths) if first is None else first
    if custom.usable(query, keys, values) and query.dtype == paddle.float32 and keys.dtype == paddle.bfloat16:
        return custom.run("ernie45_decode_attention", query, keys, values, first, lengths, scale)[0]
    return reference.decode_attention(query, keys, values, lengths, scale, first)
