"""Quantising one weight, and back: the definition in numpy, and the native code that agrees with it in every bit.

wint8: symmetric, one scale per output channel; W[i, o] is about codes[i, o] * scales[o].
wint4: one scale per output channel and group of 64 inputs; W[i, o] is about code[i, o] * scales[i // 64, o] with
codes from -8 to 7. Two inputs share a byte, the even one in its low half, in two's complement. Weights are rounded to
bfloat16 first. A scale is the best of a few by squared error, and may be negative: then the largest weight is positive
and has the code -8.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ernie45.checkpoint.dtypes import DTYPES, convert
from ernie45.errors import ErnieError
from ernie45.quantization.config import GROUP_SIZE, KINDS, WINT4, WINT8

SCALE_DTYPES = {WINT8: "F32", WINT4: "BF16"}
SMALLEST_SCALE = np.float32(2.0**-126)  # the smallest normal number: channels of zeros have a scale too
# Scales that are tried: the largest weight over these. 7 keeps both ends in range, 8 gives the largest the code -8, and
# more clips it a little. On normal weights the best of them leaves 0.71 of the squared error of 7 alone.
DIVISORS = (7.0, 8.0, 8.5, 9.0)
_CHUNK_ELEMENTS = 1 << 22  # bounds the temporaries of numpy to about 100 MB


@dataclass(frozen=True)
class Quantised:
    """A weight in 8 or 4 bits.

    Attributes:
        kind: "wint8" or "wint4".
        shape: of the weight: [in, out], or [out, in] if `outputs_first`.
        codes: int8 [in, out], or [ceil(in / 2), out] with two codes a byte.
        scales: float32 [out], or bfloat16 bits as uint16 [ceil(in / 64), out].
        outputs_first: an embedding [vocabulary, hidden], which is the transpose of a head: `codes` and `scales` are
            transposed too.
    """

    kind: str
    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray
    outputs_first: bool = False


def stored_shapes(
    kind: str, shape: tuple[int, ...], outputs_first: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales of a weight of this shape."""
    inputs, outputs = shape[::-1] if outputs_first else shape
    codes: tuple[int, ...] = (inputs, outputs)
    scales: tuple[int, ...] = (outputs,)
    if kind == WINT4:
        codes, scales = (-(-inputs // 2), outputs), (-(-inputs // GROUP_SIZE), outputs)
    return (codes[::-1], scales[::-1]) if outputs_first else (codes, scales)


def quantize(weight: np.ndarray, dtype: str, kind: str, *, outputs_first: bool = False) -> Quantised:
    """Quantises a weight, natively where the library of kernels is there.

    Args:
        weight: [in, out] in the storage of `dtype`; [out, in] if `outputs_first`.
        dtype: safetensors name of a float type.
        kind: "wint8" or "wint4".
        outputs_first: see `Quantised`.

    Raises:
        ErnieError: the weight holds NaN or infinity, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise ErnieError(f"quantization {kind!r} is unknown; choose {' or '.join(map(repr, KINDS))}")
    if outputs_first:
        codes, scales = _quantize_transposed(weight, dtype, kind)
    else:
        codes, scales = _quantize(weight, dtype, kind)
    if not np.isfinite(convert(scales, SCALE_DTYPES[kind], "F32")).all():
        raise ErnieError("holds NaN or infinity and cannot be quantised; the weights are damaged")
    return Quantised(kind, weight.shape, codes, scales, outputs_first)


def dequantize(quantised: Quantised) -> np.ndarray:
    """The weight that the codes stand for, float32 of shape `quantised.shape`."""
    if quantised.outputs_first:
        turned = Quantised(quantised.kind, quantised.shape[::-1], quantised.codes.T, quantised.scales.T)
        return dequantize(turned).T
    if quantised.kind == WINT8:
        return quantised.codes * quantised.scales
    inputs = quantised.shape[0]
    scales = np.repeat(convert(quantised.scales, "BF16", "F32"), GROUP_SIZE, axis=0)[:inputs]
    return unpack_pairs(quantised.codes, inputs) * scales


def unpack_pairs(codes: np.ndarray, inputs: int) -> np.ndarray:
    """4-bit codes [ceil(inputs / 2), out], two a byte, as int8 [inputs, out]."""
    unpacked = np.empty((2 * len(codes), *codes.shape[1:]), np.int8)
    unpacked[0::2] = (codes << 4) >> 4  # int8: shifting right keeps the sign
    unpacked[1::2] = codes >> 4
    return unpacked[:inputs]


def pack_pairs(codes: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_pairs`; an odd last input is followed by a zero."""
    even, odd = codes[0::2], codes[1::2]
    packed = even & 15
    packed[: len(odd)] |= odd << 4
    return packed


def _quantize_transposed(weight: np.ndarray, dtype: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a weight [out, in], a few MB at a time."""
    codes, scales = _empty(kind, weight.shape, outputs_first=True)
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        turned_codes, turned_scales = _quantize(weight[rows].T, dtype, kind)
        codes[rows], scales[rows] = turned_codes.T, turned_scales.T
    return codes, scales


def _quantize(weight: np.ndarray, dtype: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a weight [in, out]."""
    wanted = "BF16" if kind == WINT4 or dtype == "BF16" else "F32"
    weight = convert(np.ascontiguousarray(weight), dtype, wanted)
    codes, scales = _empty(kind, weight.shape)
    native = _native_function(kind, wanted)
    if native is not None:
        native(_pointer(weight), *map(ctypes.c_int64, weight.shape), _pointer(codes), _pointer(scales))
        return codes, scales
    definition = define_int8 if kind == WINT8 else define_int4
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[0]))
    for first in range(0, weight.shape[1], step):
        columns = slice(first, first + step)
        values = convert(np.ascontiguousarray(weight[:, columns]), wanted, "F32")
        codes[:, columns], scales[..., columns] = definition(values)
    return codes, scales


def _empty(kind: str, shape: tuple[int, ...], outputs_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = stored_shapes(kind, shape, outputs_first)
    return np.empty(codes, np.int8), np.empty(scales, DTYPES[SCALE_DTYPES[kind]].storage)


def define_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [in, out] and scales float32 [out] of a float32 weight [in, out]."""
    with np.errstate(invalid="ignore"):
        scales = np.maximum(np.abs(weight).max(axis=0, initial=0) / np.float32(127), SMALLEST_SCALE)
        return np.rint(weight * (1 / scales)).astype(np.int8), scales


def define_int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes [ceil(in / 2), out] and bfloat16 scales [ceil(in / 64), out] of a weight [in, out].

    Args:
        weight: float32 with values that bfloat16 holds exactly. Products with codes are exact then, so the order of
            the sums below is all that has to agree with the native code.
    """
    inputs, outputs = weight.shape
    groups = np.zeros((-(-inputs // GROUP_SIZE), GROUP_SIZE, outputs), np.float32)
    groups.reshape(-1, outputs)[:inputs] = weight
    with np.errstate(over="ignore", invalid="ignore"):
        scales, _ = _tried(groups, DIVISORS[0])
        scores = np.full_like(scales, np.inf)
        for divisor in DIVISORS:
            scale, score = _tried(groups, divisor)
            better = score < scores
            scales, scores = np.where(better, scale, scales), np.where(better, score, scores)
        codes = _int4_codes(groups, scales)
    return pack_pairs(codes.reshape(-1, outputs)[:inputs]), convert(scales, "F32", "BF16")


def _tried(groups: np.ndarray, divisor: float) -> tuple[np.ndarray, np.ndarray]:
    """The scales [groups, out] that a divisor gives, and their squared errors less the sums of squared weights."""
    highest, lowest = groups.max(axis=1), groups.min(axis=1)
    exact = np.maximum(np.maximum(highest, -lowest) / np.float32(divisor), SMALLEST_SCALE)
    rounded = convert(convert(exact, "F32", "BF16"), "BF16", "F32")
    scale = np.where(highest > -lowest, -rounded, rounded)
    codes = _int4_codes(groups, scale)
    product, square = np.zeros_like(scale), np.zeros_like(scale)
    for row in range(GROUP_SIZE):  # not .sum(), whose order is numpy's own
        product += groups[:, row] * codes[:, row]
        square += codes[:, row].astype(np.float32) ** 2
    return scale, (scale * square - 2 * product) * scale


def _int4_codes(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(groups * (1 / scales)[:, None]), -8, 7).astype(np.int8)


def _native_function(kind: str, dtype: str) -> Callable[..., None] | None:
    from ernie45.ops import custom

    library = custom.library() if custom.usable() else None
    if library is None:
        return None
    name = f"ernie45_quantize_{'int8' if kind == WINT8 else 'int4'}_{'bfloat16' if dtype == 'BF16' else 'float32'}"
    function = getattr(library, name)
    function.restype = None
    return function


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
