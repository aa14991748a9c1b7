"""A weight with a product of two narrow matrices beside it (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.nn.initializer import Constant, Uniform

from ernie45 import ops
from ernie45.ops import matmul
from ernie45.ops.low_rank import low_rank_linear
from ernie45.ops.packed import PackedWeight


@dataclass(frozen=True, eq=False)
class LoraWeight(ops.AdaptedWeight):
    """x W + scale * dropout(x) A B, in the place of W.

    Attributes:
        base: W, [in, out] or stacked [count, in, out]; it gets no gradient from here.
        a: [in, rank] or [count, in, rank] float32.
        b: [rank, out] or [count, rank, out] float32.
        scale: of the product.
        dropout: probability with which an entry of x is dropped on the way to A, while `layer` is in training.
        layer: the layer that multiplies by this weight.
    """

    base: Tensor | PackedWeight
    a: Tensor
    b: Tensor
    scale: float
    dropout: float
    layer: nn.Layer

    @property
    def tensor(self) -> Tensor:
        """The base, where it is not packed."""
        assert not isinstance(self.base, PackedWeight)
        return self.base

    def product(self, x: Tensor) -> Tensor:
        """See `AdaptedWeight.product`."""
        dropout = self.dropout if self.layer.training else 0.0
        if not dropout and matmul.multiplies(x, self.base):
            return low_rank_linear(x, self.base, self.a, self.b, self.scale)
        kept = F.dropout(x, dropout) if dropout else x
        narrow = paddle.matmul(kept, self.a.astype(x.dtype)) * self.scale
        return ops.linear(x, self.base) + paddle.matmul(narrow, self.b.astype(x.dtype))

    def matrices(self) -> Sequence[LoraWeight]:
        """See `AdaptedWeight.matrices`: each has its own A and B, as views."""
        parts = zip(ops.unstack(self.base), paddle.unbind(self.a), paddle.unbind(self.b), strict=True)
        return [LoraWeight(base, a, b, self.scale, self.dropout, self.layer) for base, a, b in parts]

    def merge(self) -> None:
        """W += scale * A B, in place, one matrix of a stack at a time; W is not packed."""
        if self.tensor.ndim == 3:
            for index, part in enumerate(self.matrices()):
                _add(self.tensor.detach()[index], part)
        else:
            _add(self.tensor, self)


def _add(target: Tensor, weight: LoraWeight) -> None:
    change = paddle.matmul(weight.a, weight.b) * weight.scale
    target.copy_((target.astype("float32") + change).astype(target.dtype), True)


def create_pair(layer: nn.Layer, shape: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """A and B in float32 for a weight of this shape, so that A B is zero.

    A is uniform in +-1 / sqrt(in), which is Kaiming's distribution for a slope of sqrt(5), as upstream; B is 0.
    """
    *stack, inputs, outputs = shape
    bound = 1.0 / math.sqrt(inputs)
    a = layer.create_parameter([*stack, inputs, rank], dtype="float32", default_initializer=Uniform(-bound, bound))
    b = layer.create_parameter([*stack, rank, outputs], dtype="float32", default_initializer=Constant(0.0))
    return a, b
