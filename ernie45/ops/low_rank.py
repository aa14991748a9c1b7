"""Products with a frozen weight and two narrow matrices beside it (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paddle import Tensor
from paddle.autograd import PyLayer

from ernie45.ops import custom, matmul
from ernie45.ops.packed import PackedWeight


def low_rank_linear(x: Tensor, weight: Tensor | PackedWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W + scale * x A B, with gradients for x, A and B. `matmul.multiplies` has to be true of x and W.

    Of W nothing is computed but the gradient of x, from the weight as it is stored. Both sides of all products but that
    of x and a packed weight, for which see `linear`, are rounded to bfloat16 with float32 sums. For the gradients, x
    and x A are kept in bfloat16.

    Args:
        x: [..., in] float32.
        weight: W, [in, out] bfloat16 or packed. It gets no gradient.
        a: A, [in, rank] float32.
        b: B, [rank, out] float32.

    Returns:
        [..., out] float32.
    """
    if isinstance(weight, PackedWeight):
        data, scales, *sizes = matmul.packed_arguments(weight)
        return _LowRankLinear.apply(x, a, b, _Frozen((None, data, scales), (scale, *sizes)))
    return _LowRankLinear.apply(x, a, b, _Frozen((weight, None, None), (scale, 0, *weight.shape)))


@dataclass(frozen=True)
class _Frozen:
    """What gets no gradient, as the operators take it.

    Attributes:
        weight: a parameter, or the data and scales of a packed weight; None for what there is not.
        attributes: scale of the adapter, kind of a packed weight, inputs, outputs.
    """

    weight: tuple[Tensor | None, ...]
    attributes: tuple[Any, ...]


class _LowRankLinear(PyLayer):
    """Both products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, frozen: _Frozen) -> Tensor:
        ctx.wanted, ctx.frozen = matmul.wanted(x, a, b), frozen
        out, kept = custom.run("ernie45_low_rank_linear", x, *frozen.weight, a, b, *frozen.attributes)
        ctx.save_for_backward(kept, a, b)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept, a, b), frozen = ctx.saved_tensor(), ctx.frozen
        inputs, attributes = (gradient, kept, *frozen.weight, a, b), (*frozen.attributes, ctx.wanted[0])
        found = custom.run("ernie45_low_rank_linear_backward", *inputs, *attributes)
        return tuple(part if want else None for part, want in zip(found, ctx.wanted, strict=True))
