"""FP8 (e4m3) with one float32 scale for each block: quantisation in both orientations, and fused behind SwiGLU.

A matrix x [rows, columns] becomes codes [rows, columns] in float8_e4m3fn and scales with x ~ codes * scales. A block is
1 x 128 (one row, 128 columns: activations) or 128 x 128 (weights); blocks at the edges may be smaller. `scales` is
[rows, ceil(columns / 128)] or [ceil(rows / 128), ceil(columns / 128)], in row-major order.

- The scale of a block is m / 448, where m is its largest finite magnitude and 448 the largest e4m3 value, or with
  ``scale="power_of_two"`` the smallest power of two that is not below m / 448. It is never below 2^-126, so that its
  reciprocal is finite, and it is 1 where m is 0.
- The code of v is v * (1 / scale), rounded to the nearest e4m3 value, ties to even, subnormals included, and saturated
  at +-448. An infinity becomes +-448 and NaN stays NaN; neither changes the scale, and so the precision, of its block.

The products that take such matrices (blocks of 1 x 128 times blocks of 128 x 128) run along the columns of both sides.
The backward pass of a linear layer therefore needs its operands transposed as well, quantised along the other axis.

Nothing here has a gradient. In Paddle's ``fp8_quant_blockwise``, which runs on GPUs only, powers of two are the default
and scales come transposed unless ``output_scale_transpose=False``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import paddle
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.ops import custom, fp8_reference, gpu

ROW_BLOCK = (1, 128)
SQUARE_BLOCK = (128, 128)
BLOCKS = (ROW_BLOCK, SQUARE_BLOCK)
SCALES = ("float32", "power_of_two")
DTYPES = ("float32", "bfloat16")


def fp8_quantize(x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale: str = "float32") -> tuple[Tensor, Tensor]:
    """Quantises a matrix to e4m3 in blocks.

    Args:
        x: [rows, columns], float32 or bfloat16.
        block: (1, 128) or (128, 128).
        scale: "float32" or "power_of_two".

    Returns:
        codes [rows, columns] float8_e4m3fn, scales [ceil(rows / block[0]), ceil(columns / 128)] float32.

    Raises:
        ErnieError: another rank, dtype, block or scale.
    """
    _check("fp8_quantize", x, block, scale)
    with paddle.no_grad():
        if custom.usable(x):
            codes, scales = custom.run("ernie45_fp8_quantize", x, block[0], scale == "power_of_two")
            return codes, scales
        return gpu.best(fp8_reference.quantize, x)(x, block, scale)


def fp8_quantize_transposed(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Quantises the transpose of x, [columns, rows]: a block of 1 x 128 is 128 rows of one column of x.

    Returns:
        codes [columns, rows] float8_e4m3fn, scales [ceil(columns / block[0]), ceil(rows / 128)] float32. With square
        blocks these are the transposes of what `fp8_quantize` returns.

    Raises:
        ErnieError: as `fp8_quantize`.
    """
    _check("fp8_quantize_transposed", x, block, scale)
    with paddle.no_grad():
        if custom.usable(x):
            codes, scales = custom.run("ernie45_fp8_quantize_transposed", x, block[0], scale == "power_of_two")
            return codes, scales
        return gpu.best(fp8_reference.quantize_transposed, x)(x, block, scale)


def fp8_quantize_both(
    x: Tensor, block: tuple[int, int] = ROW_BLOCK, scale: str = "float32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fp8_quantize` and `fp8_quantize_transposed` return, reading x once.

    Returns:
        codes, scales, transposed codes, transposed scales.

    Raises:
        ErnieError: as `fp8_quantize`.
    """
    _check("fp8_quantize_both", x, block, scale)
    with paddle.no_grad():
        if custom.usable(x):
            codes, scales, transposed_codes, transposed_scales = custom.run(
                "ernie45_fp8_quantize_both", x, block[0], scale == "power_of_two"
            )
            return codes, scales, transposed_codes, transposed_scales
        return gpu.best(fp8_reference.quantize_both, x)(x, block, scale)


def fp8_dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int] = ROW_BLOCK, dtype: str = "float32") -> Tensor:
    """The matrix that codes and scales stand for: their product in float32, then rounded to `dtype`.

    Args:
        codes: [rows, columns] float8_e4m3fn.
        scales: [ceil(rows / block[0]), ceil(columns / 128)] float32.
        block: the one of the quantisation.
        dtype: "float32" or "bfloat16".

    Raises:
        ErnieError: codes, scales, block and dtype that do not fit this or each other.
    """
    _check_matrix("fp8_dequantize", "codes", codes, ("float8_e4m3fn",))
    _check_matrix("fp8_dequantize", "scales", scales, ("float32",))
    _check_choice("fp8_dequantize", "block", block, BLOCKS)
    _check_choice("fp8_dequantize", "dtype", dtype, DTYPES)
    expected = fp8_reference.scales_shape(codes.shape, block)
    if list(scales.shape) != expected:
        raise ErnieError(
            f"fp8_dequantize: scales has shape {list(scales.shape)}, expected {expected} for codes of shape "
            f"{list(codes.shape)} in blocks of {block[0]} x {block[1]}; pass the block of the quantisation"
        )
    with paddle.no_grad():
        if custom.usable(codes, scales):
            return custom.run("ernie45_fp8_dequantize", codes, scales, block[0], dtype == "bfloat16")[0]
        return gpu.best(fp8_reference.dequantize, codes)(codes, scales, block, dtype)


def swiglu_fp8_quantize(x: Tensor, prob: Tensor | None = None, scale: str = "float32") -> tuple[Tensor, Tensor]:
    """`fp8_quantize` in blocks of 1 x 128 of silu(gate) * up * prob, which stays in float32 and is never stored.

    Args:
        x: [rows, 2 * width], float32 or bfloat16: gate, then up.
        prob: [rows], factors of the rows, or None for 1.
        scale: "float32" or "power_of_two".

    Returns:
        codes [rows, width] float8_e4m3fn, scales [rows, ceil(width / 128)] float32.

    Raises:
        ErnieError: another rank, dtype or scale, an odd number of columns, or not one factor for each row.
    """
    _check("swiglu_fp8_quantize", x, ROW_BLOCK, scale)
    if x.shape[1] % 2:
        raise ErnieError(f"swiglu_fp8_quantize: x has {x.shape[1]} columns, expected gate and up, an even number")
    _check_factors("swiglu_fp8_quantize", prob, x.shape[0])
    with paddle.no_grad():
        if not custom.usable(x) or not (prob is None or custom.usable(prob)):
            return gpu.best(fp8_reference.swiglu_quantize, x)(x, prob, scale)
        factors = None if prob is None else prob.astype("float32")
        codes, scales = custom.run("ernie45_swiglu_fp8_quantize", x, factors, scale == "power_of_two")
        return codes, scales


def fp8_quantize_stack(weights: Sequence[Tensor], scale: str = "float32") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights of experts, stacked and quantised in square blocks, in both orientations: see `fp8_quantize_both`.

    Args:
        weights: matrices [rows, columns] of one shape and dtype, or stacks of them [count, rows, columns].
        scale: "float32" or "power_of_two".

    Returns:
        codes [experts, rows, columns], scales [experts, ceil(rows / 128), ceil(columns / 128)], and both of the
        transposes.

    Raises:
        ErnieError: no weights, weights of different shapes or dtypes, or another dtype or scale.
    """
    if not weights:
        raise ErnieError("fp8_quantize_stack: found no weights")
    like = [weights[0].dtype, *weights[0].shape[-2:]]
    for weight in weights:
        if weight.ndim not in (2, 3) or [weight.dtype, *weight.shape[-2:]] != like:
            raise ErnieError(
                f"fp8_quantize_stack: found a weight {weight.dtype} {list(weight.shape)}, expected {like[0]} matrices "
                f"{like[1:]} or stacks of them, like the first"
            )
    _check("fp8_quantize_stack", weights[0][0] if weights[0].ndim == 3 else weights[0], SQUARE_BLOCK, scale)
    with paddle.no_grad():
        if custom.usable(*weights):
            each = [fp8_quantize_both(matrix, SQUARE_BLOCK, scale) for matrix in fp8_reference.matrices(weights)]
            return fp8_reference.stacked(each)
        return gpu.best(fp8_reference.quantize_stack, weights[0])(weights, scale)


class SwigluGradients(NamedTuple):
    """What the way back through `swiglu_fp8_quantize` gives.

    Attributes:
        x: [rows, 2 * width] in the dtype of x, the gradient of gate and up.
        prob: [rows] float32, that of the factors.
        out: [rows, width] in the dtype of x, silu(gate) * up * prob once more: the gradient of the weight behind it
            needs it, and it was not stored.
        codes, scales: `x` of this quantised in blocks of 1 x 128, for the product with the weight before it.
    """

    x: Tensor
    prob: Tensor
    out: Tensor
    codes: Tensor
    scales: Tensor


def swiglu_fp8_quantize_backward(
    x: Tensor, grad: Tensor, prob: Tensor | None = None, scale: str = "float32"
) -> SwigluGradients:
    """The gradients of `swiglu_fp8_quantize`, where quantising counts as doing nothing.

    Args:
        x, prob, scale: as of `swiglu_fp8_quantize`; width is a multiple of 128, so that no block has both gate and up.
        grad: [rows, width] in the dtype of x, the gradient of silu(gate) * up * prob.

    Raises:
        ErnieError: another shape or dtype.
    """
    operator = "swiglu_fp8_quantize_backward"
    _check(operator, x, ROW_BLOCK, scale)
    if x.shape[1] % (2 * ROW_BLOCK[1]):
        raise ErnieError(f"{operator}: x has {x.shape[1]} columns, expected gate and up, a multiple of 256")
    _check_factors(operator, prob, x.shape[0])
    expected = [x.shape[0], x.shape[1] // 2]
    if list(grad.shape) != expected:
        raise ErnieError(f"{operator}: grad has shape {list(grad.shape)}, expected {expected}")
    if grad.dtype != x.dtype:
        raise ErnieError(f"{operator}: grad is {grad.dtype}, expected {x.dtype} like x")
    with paddle.no_grad():
        found = gpu.best(fp8_reference.swiglu_quantize_backward, x)(x, grad, prob, scale)
        return SwigluGradients(*found)


def _check(operator: str, x: Tensor, block: tuple[int, int], scale: str) -> None:
    _check_matrix(operator, "x", x, DTYPES)
    _check_choice(operator, "block", block, BLOCKS)
    _check_choice(operator, "scale", scale, SCALES)


def _check_factors(operator: str, prob: Tensor | None, rows: int) -> None:
    if prob is not None and list(prob.shape) != [rows]:
        raise ErnieError(f"{operator}: prob has shape {list(prob.shape)}, expected [{rows}], one factor for each row")


def _check_matrix(operator: str, argument: str, tensor: Tensor, dtypes: tuple[str, ...]) -> None:
    if tensor.ndim != 2:
        shape = list(tensor.shape)
        raise ErnieError(f"{operator}: {argument} has shape {shape}, expected [rows, columns]; reshape it to two axes")
    if tensor.dtype not in [getattr(paddle, name) for name in dtypes]:
        found = str(tensor.dtype).removeprefix("paddle.")
        raise ErnieError(f"{operator}: {argument} is {found}, expected {' or '.join(dtypes)}; convert it with astype")


def _check_choice(operator: str, argument: str, found: object, choices: tuple[object, ...]) -> None:
    if found not in choices:
        raise ErnieError(f"{operator}: {argument} is {found!r}, expected {' or '.join(map(repr, choices))}")
