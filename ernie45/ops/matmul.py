"""Products of training, at the speed of bfloat16, and their gradients.

Paddle multiplies nothing narrower than float32 on a CPU. The fused operators round both sides to bfloat16 and sum in
float32, as the tensor cores of other devices do; they are used where the weight is bfloat16 already, or packed.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie45.ops import custom
from ernie45.ops.packed import KINDS, PackedWeight


def multiplies(x: Tensor, weight: Any) -> bool:
    """Whether the fused operators take this product: float32 activations on the CPU, a bfloat16 or packed weight."""
    known = isinstance(weight, PackedWeight) or (isinstance(weight, Tensor) and weight.dtype == paddle.bfloat16)
    return known and x.dtype == paddle.float32 and custom.usable(x)


def product(
    x: Tensor,
    y: Tensor | PackedWeight,
    *,
    transpose_x: bool = False,
    transpose_y: bool = False,
    dtype: str = "float32",
) -> Tensor:
    """x times y, both float32 or bfloat16 and rounded to the latter, with float32 sums; it has no gradient.

    Args:
        x: [..., inner]; with `transpose_x` [..., rows], where the sum is over all leading axes.
        y: [inner, columns], or with `transpose_y` [columns, inner]; here too, leading axes count as one. For a packed
            weight, that means inputs times outputs however it was published, x is not transposed and the result is
            float32. A product with a packed weight itself is that of inference: see `ernie45.ops.linear`.
        dtype: of the result, "float32" or "bfloat16".

    Returns:
        [..., columns]; with `transpose_x` [rows, columns].
    """
    if isinstance(y, PackedWeight):
        name = "ernie45_linear_transposed" if transpose_y else "ernie45_linear"
        return custom.run(name, x, *packed_arguments(y))[0]
    return custom.run("ernie45_matmul", x, y, transpose_x, transpose_y, dtype == "bfloat16")[0]


def wanted(*tensors: Tensor) -> tuple[bool, ...]:
    """Which of these get gradients."""
    return tuple(not x.stop_gradient for x in tensors)


def packed_arguments(weight: PackedWeight) -> tuple[Any, ...]:
    """A weight as the operators take it: data, scales, kind, inputs and outputs."""
    return weight.data, weight.scales, KINDS[weight.kind], weight.in_features, weight.out_features


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
        ctx.transposed, ctx.wanted = transposed, wanted(x, weight)
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
        ctx.wanted = wanted(rows, weight)
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


def head_loss(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    differentiable: bool,
    transposed: bool,
    chunk_tokens: int,
    divisor: float,
    z: float,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Cross entropy of a head with a bfloat16 or packed weight, and its gradients; see `chunked_head_loss`.

    Args:
        hidden: [n, hidden_size] float32.
        weight: [hidden_size, vocabulary], or with `transposed` [vocabulary, hidden_size]; packed either way.
        targets: [n] int64, none of them to be ignored.
        differentiable: whether gradients are wanted at all.
        divisor: of the gradients.

    Returns:
        Sum of the losses [], and the gradients, divided by the divisor, of `hidden` in float32 and of a weight that is
        not packed in bfloat16; None for what wants none.
    """
    packed = isinstance(weight, PackedWeight)
    wants = tuple(differentiable and want for want in wanted(*((hidden,) if packed else (hidden, weight))))
    attributes = (chunk_tokens, divisor, z, *wants)
    if packed:
        data, scales, *sizes = packed_arguments(weight)
        loss, *gradients = custom.run("ernie45_packed_head_loss", hidden, data, scales, targets, *sizes, *attributes)
    else:
        loss, *gradients = custom.run("ernie45_head_loss", hidden, weight, targets, transposed, *attributes)
    return loss.squeeze(0), tuple(part if want else None for part, want in zip(gradients, wants, strict=True))
