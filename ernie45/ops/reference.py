"""Definitions of the operators in plain Paddle."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.errors import ErnieError

# Elements of one block of attention scores: 2**24 float32 values are 64 MB.
SCORE_BLOCK = 2**24
# Large, finite and exact in float32: a row without any visible key becomes uniform instead of NaN.
MASKED = -1e30


def compute_dtype(parameter_dtype: paddle.dtype) -> paddle.dtype:
    """The dtype of activations for parameters of this dtype on the current device.

    Paddle has no half-precision matmul on a CPU: there, weights stay as they are and activations are float32.
    """
    return parameter_dtype if paddle.device.get_device() != "cpu" else paddle.float32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [in, out], in the dtype of x."""
    return paddle.matmul(x, weight.astype(x.dtype))


def linear_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], in the dtype of x."""
    return paddle.matmul(x, weight.astype(x.dtype), transpose_y=True)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See `ernie45.ops.embedding`."""
    return F.embedding(ids, weight).astype(compute_dtype(weight.dtype))


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `ernie45.ops.rms_norm`."""
    wide = x.astype("float32")
    if residual is not None:
        wide = wide + residual.astype("float32")
    scale = paddle.rsqrt(paddle.mean(wide * wide, axis=-1, keepdim=True) + epsilon)
    out = (wide * scale * weight.astype("float32")).astype(x.dtype)
    return out if residual is None else (out, wide.astype(x.dtype))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm (arXiv 1607.06450) over the last axis, computed in float32, in the dtype of x."""
    scale = weight.astype("float32")
    if scale.stop_gradient and not x.stop_gradient:
        # On a CPU, Paddle 3.3.1 forgets the scale in the gradient of x unless it wants the gradient of the scale too.
        scale = scale.detach()
        scale.stop_gradient = False
    wide = F.layer_norm(x.astype("float32"), x.shape[-1:], scale, bias.astype("float32"), epsilon)
    return wide.astype(x.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), an approximation of GELU (arXiv 1606.08415, section 2), in the dtype of x."""
    wide = x.astype("float32")
    return (wide * F.sigmoid(1.702 * wide)).astype(x.dtype)


def swiglu(x: Tensor, prob: Tensor | None = None) -> Tensor:
    """See `ernie45.ops.swiglu`."""
    out = F.swiglu(x.astype("float32"))
    if prob is not None:
        out = out * prob.astype("float32").unsqueeze(-1)
    return out.astype(x.dtype)


@functools.lru_cache(maxsize=16)
def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians per position of every rotary pair: theta ** (-2 j / head_dim), float32 [head_dim / 2]."""
    exponents = paddle.arange(0, head_dim, 2, dtype="float32") / head_dim
    return theta ** (-exponents)


def positions_of_pairs(positions: Tensor, pairs: int, time_pairs: int) -> Tensor:
    """The position that each rotary pair turns by: float32 [batch, sequence, pairs], or one for all of them.

    Raises:
        ErnieError: positions of another shape, or more pairs for the time than there are.
    """
    check_positions(positions, pairs, time_pairs)
    wide = positions.astype("float32")
    if positions.ndim == 2:
        return wide.unsqueeze(-1)
    axes = [0 if pair >= pairs - time_pairs else 1 + pair % 2 for pair in range(pairs)]
    return paddle.index_select(wide, paddle.to_tensor(axes, dtype="int64"), axis=-1)


def check_positions(positions: Tensor, pairs: int, time_pairs: int) -> None:
    """Raises an ErnieError for positions of another shape, or more pairs for the time than there are."""
    if positions.ndim not in (2, 3) or (positions.ndim == 3 and positions.shape[-1] != 3):
        raise ErnieError(
            f"rope_angles: positions have shape {list(positions.shape)}, expected [batch, sequence] or "
            "[batch, sequence, 3] as (time, row, column)"
        )
    if not 0 <= time_pairs <= pairs:
        raise ErnieError(f"rope_angles: time_pairs is {time_pairs}, expected 0 to head_dim / 2 = {pairs}")


def rope_angles(positions: Tensor, head_dim: int, theta: float, time_pairs: int = 0) -> tuple[Tensor, Tensor]:
    """See `ernie45.ops.rope_angles`."""
    angles = positions_of_pairs(positions, head_dim // 2, time_pairs) * rope_frequencies(head_dim, theta)
    return paddle.cos(angles).unsqueeze(2), paddle.sin(angles).unsqueeze(2)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ernie45.ops.rope`."""
    even, odd = paddle.unbind(x.astype("float32").reshape([*x.shape[:-1], x.shape[-1] // 2, 2]), axis=-1)
    rotated = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rope_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates element j of the first half of a head against element j of the second, as the vision tower does.

    Args:
        x: [tokens, heads, head_dim]
        cos, sin: [tokens, 1, head_dim / 2] float32.

    Returns:
        Like x.
    """
    left, right = paddle.chunk(x.astype("float32"), 2, axis=-1)
    return paddle.concat([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Callable[[int, int, int], Tensor | None]
) -> Tensor:
    """Grouped-query attention in blocks of query rows, so that memory does not grow with the square of the length.

    Args:
        query: [batch, rows, heads, head_dim]; the last row is the newest key.
        key, value: [batch, columns, kv_heads, head_dim]; head h reads kv head h // (heads / kv_heads).
        scale: factor of the scores, 1 / sqrt(head_dim).
        visible: visible(first_row, last_row, columns) gives a boolean mask that broadcasts to
            [batch, 1, last_row - first_row, columns] for the first `columns` keys, True where a row may look,
            or None if everything there is visible.

    Returns:
        [batch, rows, heads, head_dim]
    """
    batch, rows, heads, head_dim = query.shape
    columns, kv_heads = key.shape[1], key.shape[2]
    query = query.transpose([0, 2, 1, 3])
    key_columns = key.transpose([0, 2, 3, 1])
    value = value.transpose([0, 2, 1, 3])
    step = max(1, min(rows, SCORE_BLOCK // max(1, batch * heads * columns)))
    blocks = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        block = query[:, :, first:last].reshape([batch, kv_heads, -1, head_dim])
        scores = paddle.matmul(block, key_columns).astype("float32") * scale
        mask = visible(first, last, columns)
        if mask is not None:
            scores = scores.reshape([batch, heads, last - first, columns])
            scores = paddle.where(mask, scores, paddle.full([1], MASKED, "float32"))
            scores = scores.reshape([batch, kv_heads, -1, columns])
        weights = F.softmax(scores, axis=-1).astype(value.dtype)
        blocks.append(paddle.matmul(weights, value).reshape([batch, heads, last - first, head_dim]))
    mixed = blocks[0] if len(blocks) == 1 else paddle.concat(blocks, axis=2)
    return mixed.transpose([0, 2, 1, 3])


def attention_by_frame(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Attention inside each frame, in both directions.

    Args:
        query, key, value: [N, heads, head_dim], of which each frame is the next lengths[i] rows.
        lengths: rows of each frame.

    Returns:
        [N, heads, head_dim]
    """
    # All frames of one size go through one product each: training has many small pictures in a batch.
    scale = query.shape[-1] ** -0.5
    sizes = np.asarray(lengths)
    starts = np.cumsum(sizes) - sizes
    order, mixed = [], []
    for size in np.unique(sizes):
        rows = (starts[sizes == size][:, None] + np.arange(size)).reshape(-1)
        q, k, v = (
            paddle.gather(tensor, paddle.to_tensor(rows)).reshape([-1, int(size), *tensor.shape[1:]])
            for tensor in (query, key, value)
        )
        order.append(rows)
        mixed.append(attention(q, k, v, scale, lambda first, last, columns: None).flatten(0, 1))
    return paddle.gather(paddle.concat(mixed, axis=0), paddle.to_tensor(np.argsort(np.concatenate(order))))


def moe_gate(
    logits: Tensor, bias: Tensor | None, k: int, activation: str, normalise: bool, minimum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ernie45.ops.moe_gate`."""
    probabilities = softmax(logits) if activation == "softmax" else F.sigmoid(logits)
    scores = probabilities.detach() if bias is None else probabilities.detach() + bias.detach()
    # Not paddle.topk: it leaves the order of equal scores open.
    indices = paddle.argsort(scores, axis=-1, descending=True, stable=True)[:, :k]
    weights = paddle.take_along_axis(probabilities, indices, axis=-1)
    if normalise:
        weights = weights / paddle.clip(weights.sum(axis=-1, keepdim=True), min=minimum)
    return probabilities, indices, weights


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis. Unlike Paddle's on a CPU, NaN makes the row NaN at any width."""
    powers = paddle.exp(logits - logits.detach().max(axis=-1, keepdim=True))
    return powers / powers.sum(axis=-1, keepdim=True)


def moe_permute(x: Tensor, indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ernie45.ops.moe_permute`."""
    flat = indices.flatten()
    order = paddle.argsort(flat, stable=True)
    counts = paddle.bincount(flat, minlength=num_experts)
    offsets = paddle.concat([paddle.zeros([1], "int64"), paddle.cumsum(counts)])
    return paddle.gather(x, order // indices.shape[1]), counts, offsets, paddle.argsort(order).reshape(indices.shape)


def moe_combine(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `ernie45.ops.moe_combine`."""
    chosen = paddle.gather(rows, slots.flatten()).reshape([*slots.shape, rows.shape[1]])
    return (chosen.astype("float32") * weights.astype("float32").unsqueeze(-1)).sum(axis=1).astype(rows.dtype)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, first: Tensor
) -> Tensor:
    """See `ernie45.ops.decode_attention`."""
    new, columns = query.shape[1], paddle.arange(keys.shape[1]).reshape([1, 1, 1, -1])
    newest = lengths.reshape([-1, 1, 1, 1]) - new + paddle.arange(new).reshape([1, 1, -1, 1])
    seen = paddle.logical_and(columns <= newest, columns >= first.reshape([-1, 1, 1, 1]))

    def visible(start: int, stop: int, _: int) -> Tensor:
        return seen[:, :, start:stop]

    # What lies outside a row's keys is not defined and may be NaN, which a weight of zero would not remove.
    held = paddle.logical_and(columns < lengths.reshape([-1, 1, 1, 1]), columns >= first.reshape([-1, 1, 1, 1]))
    held = held.transpose([0, 3, 1, 2])
    keys = paddle.where(held, keys.astype(query.dtype), paddle.zeros([1], query.dtype))
    values = paddle.where(held, values.astype(query.dtype), paddle.zeros([1], query.dtype))
    mixed = attention(query, keys, values, scale, visible)
    return paddle.where(seen.any(axis=-1).transpose([0, 2, 1]).unsqueeze(-1), mixed, paddle.zeros_like(mixed))
