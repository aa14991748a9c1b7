"""Products of FP8 matrices with one scale for each block, as `ernie45.ops.fp8` makes them.

On a GPU from Hopper on, Paddle's `fp8_gemm_blockwise` (cuBLASLt) computes them; elsewhere the definition does. Nothing
here has a gradient: the products of a backward pass are further products, of operands quantised along the other axis.
"""

from __future__ import annotations

import paddle
import paddle.incubate.nn.functional as fused
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.ops import custom, fp8, fp8_reference, gpu

BLOCK = 128
ROWS = 16  # cuBLASLt reads as many rows, and their scales, at once
HOPPER = (9, 0)
OLDEST_CUDA = (12, 9)  # its cuBLASLt has scales for each block


def fp8_linear(
    codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, dtype: str = "bfloat16"
) -> Tensor:
    """x [rows, in] times the transpose of a weight [out, in], summed in float32.

    Args:
        codes, scales: of x in blocks of 1 x 128, as `fp8_quantize(x)` returns them.
        weight_codes, weight_scales: of the weight in blocks of 128 x 128. Of a weight stored as [in, out] they are what
            `fp8_quantize_transposed(weight, (128, 128))` returns.
        dtype: "float32" or "bfloat16".

    Returns:
        [rows, out] in `dtype`.

    Raises:
        ErnieError: codes and scales that do not fit this or each other, or another dtype.
    """
    _check_operands("fp8_linear", codes, scales, weight_codes.shape[-2:], weight_scales.shape[-2:], dtype)
    with paddle.no_grad():
        return _linear(codes, scales, weight_codes, weight_scales, dtype)


def fp8_expert_linear(
    codes: Tensor,
    scales: Tensor,
    counts: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    dtype: str = "bfloat16",
) -> Tensor:
    """Products of rows with the weights of their experts; see `fp8_linear`. Experts without rows are not touched.

    Args:
        codes, scales: of the rows, sorted by expert.
        counts: [experts] int64, rows of each expert; together those of codes.
        weight_codes: [experts, out, in]
        weight_scales: [experts, ceil(out / 128), ceil(in / 128)]
        dtype: "float32" or "bfloat16".

    Returns:
        [rows, out] in `dtype`.

    Raises:
        ErnieError: as `fp8_linear`.
    """
    _check_operands("fp8_expert_linear", codes, scales, weight_codes.shape[-2:], weight_scales.shape[-2:], dtype)
    sizes = counts.tolist()
    if len(sizes) != weight_codes.shape[0] or sum(sizes) != codes.shape[0]:
        raise ErnieError(
            f"fp8_expert_linear: counts has {len(sizes)} experts and {sum(sizes)} rows, expected those of "
            f"weight_codes, {weight_codes.shape[0]}, and codes, {codes.shape[0]}"
        )
    with paddle.no_grad():
        results, first = [paddle.zeros([0, weight_codes.shape[1]], dtype)], 0
        for expert, size in enumerate(sizes):
            if size:
                rows = slice(first, first + size)
                results.append(_linear(codes[rows], scales[rows], weight_codes[expert], weight_scales[expert], dtype))
            first += size
        return paddle.concat(results)


def _linear(codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, dtype: str) -> Tensor:
    if 0 in codes.shape or 0 in weight_codes.shape:
        return paddle.zeros([codes.shape[0], weight_codes.shape[0]], dtype)
    if _blockwise_product_takes(codes, weight_codes):
        return _blockwise_product(codes, scales, weight_codes, weight_scales, dtype)
    x = fp8_reference.dequantize(codes, scales, fp8.ROW_BLOCK, "float32")
    weight = fp8_reference.dequantize(weight_codes, weight_scales, fp8.SQUARE_BLOCK, "float32")
    return paddle.matmul(x, weight, transpose_y=True).astype(dtype)


def _blockwise_product_takes(codes: Tensor, weight_codes: Tensor) -> bool:
    """Whether this is a Hopper GPU or a later one, a Paddle that has the operator, and nothing but whole blocks."""
    if not gpu.on_gpu(codes) or custom.wants_reference() or not hasattr(fused, "fp8_gemm_blockwise"):
        return False
    whole = all(size % BLOCK == 0 for size in weight_codes.shape)
    return whole and paddle.device.cuda.get_device_capability() >= HOPPER and _cuda_version() >= OLDEST_CUDA


def _cuda_version() -> tuple[int, ...]:
    """Of the CUDA that Paddle was compiled with."""
    return tuple(int(part) for part in paddle.version.cuda().split(".")[:2])


def _blockwise_product(
    codes: Tensor, scales: Tensor, weight_codes: Tensor, weight_scales: Tensor, dtype: str
) -> Tensor:
    """Paddle's product takes scales of rows as [in / 128, rows], and those of square blocks as they are."""
    rows = codes.shape[0]
    if below := -rows % ROWS:
        zeros = paddle.zeros([below, codes.shape[1]], "uint8")
        codes = paddle.concat([codes.view("uint8"), zeros]).view("float8_e4m3fn")
        scales = paddle.concat([scales, paddle.zeros([below, scales.shape[1]])])
    return fused.fp8_gemm_blockwise(
        a=codes,
        a_decode_scale=scales.T.contiguous(),
        b=weight_codes.contiguous(),
        b_decode_scale=weight_scales.contiguous(),
        out_dtype=getattr(paddle, dtype),
        is_a_1d_scaled=True,
        is_b_1d_scaled=False,
    )[:rows]


def _check_operands(
    operator: str, codes: Tensor, scales: Tensor, weight: list[int], weight_scales: list[int], dtype: str
) -> None:
    if dtype not in fp8.DTYPES:
        raise ErnieError(f"{operator}: dtype is {dtype!r}, expected {' or '.join(map(repr, fp8.DTYPES))}")
    if codes.ndim != 2 or len(weight) != 2 or codes.shape[1] != weight[1]:
        raise ErnieError(
            f"{operator}: codes has shape {list(codes.shape)} and each weight {list(weight)}, "
            "expected [rows, in] and [out, in]"
        )
    for name, found, shape, block in (
        ("scales", scales.shape, codes.shape, fp8.ROW_BLOCK),
        ("weight_scales", weight_scales, weight, fp8.SQUARE_BLOCK),
    ):
        expected = fp8_reference.scales_shape(shape, block)
        if list(found) != expected:
            raise ErnieError(f"{operator}: {name} has shape {list(found)}, expected {expected}")
