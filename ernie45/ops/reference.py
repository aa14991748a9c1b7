"""Definitions of the operators in plain Paddle."""

from __future__ import annotations

from collections.abc import Callable

import paddle
import paddle.nn.functional as F
from paddle import Tensor

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


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis; statistics in float32, rounded to the dtype of x before the weight [H] is applied."""
    wide = x.astype("float32")
    scale = paddle.rsqrt(paddle.mean(wide * wide, axis=-1, keepdim=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def swiglu(x: Tensor) -> Tensor:
    """SwiGLU of the fused projection [..., 2 * F]: silu(first half: gate) * second half (up) -> [..., F]."""
    return F.swiglu(x)


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every rotary pair, in float32.

    Pair j turns by position * theta ** (-2 j / head_dim) (RoFormer, arXiv 2104.09864).

    Args:
        positions: [batch, sequence], any number type.

    Returns:
        cos, sin: [batch, sequence, 1, head_dim / 2], broadcastable over heads.
    """
    exponents = paddle.arange(0, head_dim, 2, dtype="float32") / head_dim
    angles = positions.astype("float32").unsqueeze(-1) * theta ** (-exponents)
    return paddle.cos(angles).unsqueeze(2), paddle.sin(angles).unsqueeze(2)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs (2j, 2j + 1) of x [batch, sequence, heads, head_dim] in float32.

    ERNIE's decoder rotates neighbours over the whole head, not the two halves against each other.
    """
    even, odd = paddle.unbind(x.astype("float32").reshape([*x.shape[:-1], -1, 2]), axis=-1)
    rotated = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


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


def moe_gate(
    logits: Tensor, bias: Tensor | None, k: int, activation: str, normalise: bool, minimum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses k experts per token. The bias only selects; the weights come from the unbiased probabilities.

    Args:
        logits: [tokens, experts] float32.
        bias: correction bias [experts] float32, or None.
        activation: "softmax" over all experts or "sigmoid".
        normalise: divide the chosen weights by their sum, clipped from below at `minimum`.

    Returns:
        probabilities [tokens, experts], indices [tokens, k] int64, weights [tokens, k], all float32 but the indices.
    """
    probabilities = F.softmax(logits, axis=-1) if activation == "softmax" else F.sigmoid(logits)
    scores = probabilities.detach() if bias is None else probabilities.detach() + bias
    indices = paddle.topk(scores, k, axis=-1)[1]
    weights = paddle.take_along_axis(probabilities, indices, axis=-1)
    if normalise:
        weights = weights / paddle.clip(weights.sum(axis=-1, keepdim=True), min=minimum)
    return probabilities, indices, weights
