"""RMSNorm, SwiGLU and rotary positions: the fused operator where there is one, the definition elsewhere.

Everything is computed in float32 and each result is rounded once, to the dtype of the input. The fused operators take
float32 and bfloat16 on the CPU, and float16 as well on a GPU.
"""

from __future__ import annotations

from typing import overload

import paddle
from paddle import Tensor

from ernie45.ops import custom, gpu, reference


@overload
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) over the last axis: x / sqrt(mean(x ** 2) + epsilon) * weight.

    Args:
        x: [..., width]
        weight: [width]
        residual: like x; if given, it is added to x before the norm, in float32.

    Returns:
        The normed x, in its dtype; with a residual, a pair of that and the new residual x + residual.
    """
    if not fused(x):
        return gpu.best(reference.rms_norm, x)(x, weight, epsilon, residual)
    if residual is None:
        return narrow(custom.run("ernie45_rms_norm", widen(x), widen(weight), epsilon)[0], x)
    out, total = custom.run("ernie45_add_rms_norm", widen(x), widen(residual), widen(weight), epsilon)
    return narrow(out, x), narrow(total, x)


def swiglu(x: Tensor, prob: Tensor | None = None) -> Tensor:
    """SwiGLU (arXiv 2002.05202) of a fused projection: silu(first half: gate) * second half (up) * prob.

    Args:
        x: [..., 2 * width]
        prob: [...], factors of the rows, such as the weights of the experts that computed them. Multiplied here, they
            need no copy of what the experts return for the gradient.

    Returns:
        [..., width], in the dtype of x.
    """
    if not fused(x):
        return gpu.best(reference.swiglu, x)(x, prob)
    if prob is None:
        return narrow(custom.run("ernie45_swiglu", widen(x))[0], x)
    return narrow(custom.run("ernie45_swiglu_prob", widen(x), widen(prob))[0], x)


def rope_angles(positions: Tensor, head_dim: int, theta: float, time_pairs: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of every rotary pair, in float32.

    Pair j turns by position * theta ** (-2 j / head_dim) (RoFormer, arXiv 2104.09864). With three positions per token,
    as in ERNIE 4.5 VL, the last `time_pairs` pairs, which turn slowest, take the time; before them, even pairs take
    the row and odd pairs the column. Three equal positions give what one gives.

    Args:
        positions: [batch, sequence], or [batch, sequence, 3] as (time, row, column); any number type.
        time_pairs: of head_dim / 2; `freq_allocation` of the published config, 20. Only for three positions.

    Returns:
        cos, sin: [batch, sequence, 1, head_dim / 2], broadcastable over heads.

    Raises:
        ErnieError: positions of another shape, or more pairs for the time than there are.
    """
    if not custom.usable(positions):
        return gpu.best(reference.rope_angles, positions)(positions, head_dim, theta, time_pairs)
    of_pairs = reference.positions_of_pairs(positions, head_dim // 2, time_pairs)
    cos, sin = custom.run("ernie45_rope_angles", of_pairs, reference.rope_frequencies(head_dim, theta))
    return cos, sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent pairs (2j, 2j + 1) by the angles of `rope_angles`, for positions in one or three dimensions.

    ERNIE's decoder rotates neighbours over the whole head, not the two halves against each other.

    Args:
        x: [batch, sequence, heads, head_dim]
        cos, sin: [batch or 1, sequence, 1, head_dim / 2] float32; no gradient flows to them.

    Returns:
        Like x.
    """
    if not fused(x):
        return gpu.best(reference.rope, x)(x, cos, sin)
    return narrow(custom.run("ernie45_rope", widen(x), cos, sin)[0], x)


def fused(x: Tensor) -> bool:
    """Whether the fused operators take this input, with weights of any dtype on the same device."""
    return custom.usable(x) and x.dtype in (paddle.float32, paddle.bfloat16)


def widen(x: Tensor) -> Tensor:
    """x in float32, for a fused operator: itself if it is that already."""
    if x.dtype == paddle.float32:
        return x
    return custom.run("ernie45_widen", x)[0] if x.dtype == paddle.bfloat16 else x.astype("float32")


def narrow(result: Tensor, like: Tensor) -> Tensor:
    """The float32 result of a fused operator in the dtype of its input, float32 or bfloat16."""
    return result if like.dtype == paddle.float32 else custom.run("ernie45_narrow", result)[0]
