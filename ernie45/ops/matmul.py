"""Products with weights that are being trained, at the speed of bfloat16, and their gradients.

Paddle multiplies nothing narrower than float32 on a CPU. The fused operators round both sides to bfloat16 and sum in
float32, as the tensor cores of other devices do; they are used where the weight is bfloat16 already.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie45.ops import custom


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused operators take this product: float32 activations on the CPU with a bfloat16 weight."""
    return weight.dtype == paddle.bfloat16 and x.dtype == paddle.float32 and custom.usable(x)


def product(
    x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False, dtype: str = "float32"
) -> Tensor:
    """x times y, both float32 or bfloat16 and rounded to the latter, with float32 sums; it has no gradient.

    Args:
        x: [..., inner]; with `transpose_x` [..., rows], where the sum is over all leading axes.
        y: [inner, columns], or with `transpose_y` [columns, inner]; here too, leading axes count as one.
        dtype: of the result, "float32" or "bfloat16".

    Returns:
        [..., columns]; with `transpose_x` [rows, columns].
    """
    return custom.run("ernie45_matmul", x, y, transpose_x, transpose_y, dtype == "bfloat16")[0]


def linear(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """x [..., in] float32 times a bfloat16 weight [in, out], or the transpose of [out, in], with both gradients.

    For the gradient of the weight, which is bfloat16, x is kept in bfloat16.
    """
    if paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient):
        return _Linear.apply(x, weight, transposed)
    return product(x, weight, transpose_y=transposed)


class _Linear(PyLayer):
    """The product with a matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.transposed, ctx.wanted = transposed, _wanted(x, weight)
        rounded = _rounded(x)
        ctx.save_for_backward(rounded if ctx.wanted[1] else None, weight)
        return product(rounded, weight, transpose_y=transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rounded, weight = ctx.saved_tensor()
        of_x = product(gradient, weight, transpose_y=not ctx.transposed) if ctx.wanted[0] else None
        of_weight = None
        if ctx.wanted[1]:
            sides = (gradient, rounded) if ctx.transposed else (rounded, gradient)
            of_weight = product(*sides, transpose_x=True, dtype="bfloat16")
        return of_x, of_weight


def expert_linear(rows: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """rows [n, in] float32, sorted by expert, times stacked bfloat16 weights [experts, in, out], with both gradients.

    Args:
        counts: [experts] int64, rows of each expert.
    """
    if paddle.is_grad_enabled() and not (rows.stop_gradient and weight.stop_gradient):
        return _ExpertLinear.apply(rows, counts, weight)
    return _expert_product(rows, counts, weight)


def _expert_product(rows: Tensor, counts: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    return custom.run("ernie45_expert_linear", rows, counts, weight, transposed)[0]


class _ExpertLinear(PyLayer):
    """The products with a stack of matrices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
        ctx.wanted = _wanted(rows, weight)
        rounded = _rounded(rows)
        ctx.save_for_backward(rounded if ctx.wanted[1] else None, counts, weight)
        return _expert_product(rounded, counts, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rounded, counts, weight = ctx.saved_tensor()
        of_rows = _expert_product(gradient, counts, weight, transposed=True) if ctx.wanted[0] else None
        of_weight = custom.run("ernie45_expert_outer_products", rounded, counts, gradient)[0] if ctx.wanted[1] else None
        return of_rows, None, of_weight


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a bfloat16 weight [vocabulary, width] in float32, with its gradient.

    A token that occurs often has a gradient of many parts: they are summed in float32 and rounded once.
    """
    if paddle.is_grad_enabled() and not weight.stop_gradient:
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight).astype("float32")


class _Embedding(PyLayer):
    """Rows of a table."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary = weight.shape[0]
        return F.embedding(ids, weight).astype("float32")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensor()
        return None, custom.run("ernie45_sum_rows_by_id", ids, gradient, ctx.vocabulary)[0]


def _rounded(x: Tensor) -> Tensor:
    return custom.run("ernie45_narrow", x)[0]


def _wanted(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether x and the weight get gradients."""
    return not x.stop_gradient, not weight.stop_gradient


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, transposed: bool, chunk_tokens: int, divisor: float, z: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross entropy of a head with a bfloat16 weight, and the gradients of what wants one; see `chunked_head_loss`.

    Args:
        hidden: [n, hidden_size] float32.
        weight: [hidden_size, vocabulary], or with `transposed` [vocabulary, hidden_size].
        targets: [n] int64, none of them to be ignored.
        divisor: of the gradients.

    Returns:
        Sum of the losses [], gradients of `hidden` in float32 and of `weight` in bfloat16, divided by the divisor.
    """
    wanted = _wanted(hidden, weight)
    attributes = (transposed, chunk_tokens, divisor, z, *wanted)
    loss, *gradients = custom.run("ernie45_head_loss", hidden, weight, targets, *attributes)
    of_hidden, of_weight = (part if want else None for part, want in zip(gradients, wanted, strict=True))
    return loss.squeeze(0), of_hidden, of_weight
