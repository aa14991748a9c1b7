"""Products with plain or packed weights, and embeddings: the fused operator where there is one, else the definition."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypeAlias

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie45.ops import custom, matmul, reference
from ernie45.ops.elementwise import narrow, widen
from ernie45.ops.packed import PackedWeight
from ernie45.ops.weight_only import WeightOnly, WeightOnlyStack


class AdaptedWeight(abc.ABC):
    """A weight to whose product something is added. It stands in a layer in the weight's place, put there from outside.

    Attributes:
        base: the weight, [in, out] or stacked [count, in, out].
    """

    base: Tensor | PackedWeight | WeightOnly | WeightOnlyStack

    @property
    def shape(self) -> list[int]:
        """Shape of the weight."""
        return list(self.base.shape)

    @abc.abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight, and what is added: [..., out], in the dtype of x."""

    @abc.abstractmethod
    def matrices(self) -> Sequence[AdaptedWeight]:
        """Those of a stack, one by one."""


Weight: TypeAlias = Tensor | PackedWeight | WeightOnly | WeightOnlyStack | AdaptedWeight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times a weight [in, out], in the dtype of x.

    Packed weights accumulate in float32 (bfloat16) or exactly (8 and 4 bits); activations enter such a product rounded
    to bfloat16, or to 15 bits with one scale per row. They have no gradient themselves; that of x is computed with what
    they stand for, in bfloat16. With plain bfloat16 weights on a CPU, both sides of the product and of its gradients
    are rounded to bfloat16 and sums are float32, too; with float32 weights nothing is rounded. On a GPU weights of 8
    and 4 bits go through Paddle's `weight_only_linear`, in the dtype of their scales.
    """
    if isinstance(weight, AdaptedWeight | WeightOnly):
        return weight.product(x)
    if not isinstance(weight, PackedWeight):
        return matmul.linear(x, weight) if matmul.multiplies(x, weight) else reference.linear(x, weight)
    if not custom.usable(x):
        return reference.linear(x, weight.dense())
    if paddle.is_grad_enabled() and not x.stop_gradient:
        return _PackedProduct.apply(x, weight)
    return narrow(matmul.product(widen(x), weight), x)


class _PackedProduct(PyLayer):
    """The product with a gradient for x: dy times the transpose of the weight."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        context.weight = weight
        return narrow(matmul.product(widen(x), weight), x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return input_gradient(gradient, context.weight)


def input_gradient(gradient: Tensor, weight: PackedWeight) -> Tensor:
    """gradient [..., out] of a product with a packed weight -> [..., in], that of its input, in the same dtype."""
    if not custom.usable(gradient):
        return paddle.matmul(gradient, weight.columns(paddle.arange(weight.out_features)).astype(gradient.dtype))
    return narrow(matmul.product(gradient, weight, transpose_y=True), gradient)


def linear_transposed(x: Tensor, weight: Weight) -> Tensor:
    """x [..., in] times the transpose of a weight [out, in], in the dtype of x; see `linear`."""
    if isinstance(weight, PackedWeight):
        return linear(x, weight)  # panels have no orientation
    if matmul.multiplies(x, weight):
        return matmul.linear(x, weight, transposed=True)
    return reference.linear_transposed(x, weight)


def expert_linear(rows: Tensor, counts: Tensor, weight: Weight) -> Tensor:
    """Products of rows with the weights of their experts; see `linear`. Experts without rows are not touched.

    Args:
        rows: [n, in], sorted by expert.
        counts: [experts] int64, rows of each expert; together n.
        weight: stacked [experts, in, out].

    Returns:
        [n, out] in the dtype of rows.
    """
    if isinstance(weight, Tensor) and matmul.multiplies(rows, weight):
        return matmul.expert_linear(rows, counts, weight)
    sizes = counts.tolist()
    chosen = [expert for expert, size in enumerate(sizes) if size]
    if not chosen:
        return paddle.zeros([0, weight.shape[-1]], dtype=rows.dtype)
    matrices, parts = unstack(weight), paddle.split(rows, [sizes[expert] for expert in chosen], axis=0)
    return paddle.concat([linear(part, matrices[expert]) for expert, part in zip(chosen, parts, strict=True)], axis=0)


def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """Rows of a weight [vocabulary, width] for ids [...] int64: [..., width] in the dtype of activations."""
    if isinstance(weight, PackedWeight):
        return weight.columns(ids)
    if isinstance(weight, Tensor) and weight.dtype == paddle.bfloat16 and custom.usable(ids, weight):
        return matmul.embedding(ids, weight)
    return reference.embedding(ids, weight)


def rounds_activations(x: Tensor, weight: Weight) -> bool:
    """Whether this is a layer to be trained at the speed of bfloat16: float32 activations are rounded in its products.

    Packed weights round, too, but without a gradient, what goes with them stays as exact as it is in inference.
    """
    base = weight.base if isinstance(weight, AdaptedWeight) else weight
    trained = paddle.is_grad_enabled() and (base is not weight or not x.stop_gradient)
    return matmul.multiplies(x, base) and (trained or not isinstance(base, PackedWeight))


def unstack(weight: Weight) -> Sequence[Weight]:
    """The matrices of a stack [count, in, out], as views."""
    if isinstance(weight, AdaptedWeight):
        return weight.matrices()
    if isinstance(weight, PackedWeight):
        return [weight[index] for index in range(weight.count or 0)]
    return weight if isinstance(weight, WeightOnlyStack) else paddle.unbind(weight)
