"""Products with plain or packed weights, and embeddings: the fused operator where there is one, else the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import paddle
from paddle import Tensor

from ernie45.ops import custom, reference
from ernie45.ops.elementwise import narrow, widen
from ernie45.ops.packed import KINDS, PackedWeight

Weight: TypeAlias = Tensor | PackedWeight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times a weight [in, out], in the dtype of x.

    Packed weights accumulate in float32 (bfloat16) or exactly (8 and 4 bits); activations enter such a product rounded
    to bfloat16, or to 15 bits with one scale per row. No gradient flows through packed weights.
    """
    if not isinstance(weight, PackedWeight):
        return reference.linear(x, weight)
    if not custom.usable(x):
        return reference.linear(x, weight.dense())
    sizes = (KINDS[weight.kind], weight.in_features, weight.out_features)
    return narrow(custom.run("ernie45_linear", widen(x), weight.data, weight.scales, *sizes)[0], x)


def linear_transposed(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times the transpose of a weight [out, in], in the dtype of x; see `linear`."""
    if isinstance(weight, PackedWeight):
        return linear(x, weight)  # panels have no orientation
    return reference.linear_transposed(x, weight)


def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """Rows of a weight [vocabulary, width] for ids [...] int64: [..., width] in the dtype of activations."""
    if isinstance(weight, PackedWeight):
        return weight.columns(ids)
    return reference.embedding(ids, weight)


def unstack(weight: Weight) -> Sequence[Weight]:
    """The matrices of a stack [count, in, out], as views."""
    if isinstance(weight, PackedWeight):
        return [weight[index] for index in range(weight.count or 0)]
    return paddle.unbind(weight)
