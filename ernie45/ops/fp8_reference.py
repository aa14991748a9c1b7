"""Definitions of the FP8 operators in plain Paddle. `ernie45.ops.fp8` says in words what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.ops import reference

# The largest value of e4m3.
LARGEST = 448.0
# A scale at least as large as the smallest normal float32 has a finite reciprocal.
SMALLEST_SCALE = 2.0**-126


def scales_shape(shape: Sequence[int], block: tuple[int, int]) -> list[int]:
    """The shape of the scales of a matrix of this shape."""
    return [-(-size // length) for size, length in zip(shape, block, strict=True)]


def quantize(x: Tensor, block: tuple[int, int], scale: str) -> tuple[Tensor, Tensor]:
    """See `ernie45.ops.fp8_quantize`."""
    blocks = _split(x.astype("float32"), block)
    finite = paddle.where(paddle.isfinite(blocks), blocks.abs(), paddle.zeros_like(blocks))
    largest = paddle.amax(finite, axis=[1, 3])
    scales = _power_of_two_scales(largest) if scale == "power_of_two" else _float32_scales(largest)
    # Not `largest == 0`: Paddle takes floats that are closer than 1e-8 for equal.
    scales = paddle.where(largest > 0, scales, paddle.ones_like(scales))
    # Paddle divides by or into a plain number with its reciprocal, which rounds twice: both sides are tensors.
    reciprocals = paddle.divide(paddle.ones_like(scales), scales)
    codes = _encode(blocks * reciprocals.unsqueeze([1, 3]))
    whole = codes.reshape([blocks.shape[0] * blocks.shape[1], blocks.shape[2] * blocks.shape[3]])
    return whole[: x.shape[0], : x.shape[1]].contiguous().view("float8_e4m3fn"), scales


def quantize_transposed(x: Tensor, block: tuple[int, int], scale: str) -> tuple[Tensor, Tensor]:
    """See `ernie45.ops.fp8_quantize_transposed`."""
    return quantize(x.transpose([1, 0]), block, scale)


def quantize_both(x: Tensor, block: tuple[int, int], scale: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ernie45.ops.fp8_quantize_both`."""
    return *quantize(x, block, scale), *quantize_transposed(x, block, scale)


def dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: str) -> Tensor:
    """See `ernie45.ops.fp8_dequantize`."""
    rows, columns = codes.shape
    factors = scales.repeat_interleave(block[0], axis=0)[:rows].repeat_interleave(block[1], axis=1)[:, :columns]
    return (codes.astype("float32") * factors).astype(dtype)


def swiglu_quantize(x: Tensor, prob: Tensor | None, scale: str) -> tuple[Tensor, Tensor]:
    """See `ernie45.ops.swiglu_fp8_quantize`."""
    return quantize(reference.swiglu(x.astype("float32"), prob), (1, 128), scale)


def quantize_stack(weights: Sequence[Tensor], scale: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ernie45.ops.fp8_quantize_stack`."""
    return stacked([quantize_both(matrix, (128, 128), scale) for matrix in matrices(weights)])


def matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of weights that are matrices or stacks of them."""
    return [matrix for weight in weights for matrix in (paddle.unbind(weight) if weight.ndim == 3 else [weight])]


def stacked(quantised: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_both` returned for several matrices, stacked. Paddle stacks no float8."""
    codes, scales, transposed, transposed_scales = (list(parts) for parts in zip(*quantised, strict=True))
    codes, transposed = (
        paddle.stack([part.view("uint8") for part in parts]).view("float8_e4m3fn") for parts in (codes, transposed)
    )
    return codes, paddle.stack(scales), transposed, paddle.stack(transposed_scales)


def swiglu_quantize_backward(
    x: Tensor, grad: Tensor, prob: Tensor | None, scale: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ernie45.ops.swiglu_fp8_quantize_backward`."""
    gate, up = paddle.chunk(x.astype("float32"), 2, axis=-1)
    sigmoid, incoming = F.sigmoid(gate), grad.astype("float32")
    silu = gate * sigmoid
    factors = paddle.ones([x.shape[0], 1]) if prob is None else prob.astype("float32").unsqueeze(-1)
    of_product = incoming * factors
    of_gate = of_product * up * (sigmoid + silu * (1 - sigmoid))
    grad_x = paddle.concat([of_gate, of_product * silu], axis=-1).astype(x.dtype)
    grad_prob = (incoming * silu * up).sum(axis=-1)
    return grad_x, grad_prob, (silu * up * factors).astype(x.dtype), *quantize(grad_x, (1, 128), scale)


def _split(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix as [row blocks, block rows, column blocks, block columns], padded with zeros."""
    row_blocks, column_blocks = scales_shape(x.shape, block)
    below, right = row_blocks * block[0] - x.shape[0], column_blocks * block[1] - x.shape[1]
    return F.pad(x, [0, below, 0, right]).reshape([row_blocks, block[0], column_blocks, block[1]])


def _float32_scales(largest: Tensor) -> Tensor:
    return paddle.clip(paddle.divide(largest, paddle.full_like(largest, LARGEST)), min=SMALLEST_SCALE)


def _power_of_two_scales(largest: Tensor) -> Tensor:
    """In integers, because it has to be exact: 448 is 1.75 * 2^8, so 8 is taken from the exponent, after adding 1 to it
    where the mantissa is above 1.75, which the carry out of the mantissa does."""
    exponents = ((largest.view("int32") + 0x1FFFFF) >> 23) - 8
    return (paddle.clip(exponents, min=1) << 23).view("float32")


def _encode(x: Tensor) -> Tensor:
    """The e4m3 codes, as uint8, of float32 values."""
    # Alone, Paddle's conversion on a CPU turns NaN into 448 and what lies between 464 and 480 into NaN.
    codes = paddle.clip(x, -LARGEST, LARGEST).astype("float8_e4m3fn").view("uint8")
    return codes | (paddle.isnan(x).astype("uint8") * 0x7F)
