"""Element types of safetensors files, how numpy holds them, and conversion between the float types.

numpy has no bfloat16 and no 8-bit floats: such tensors are unsigned integers that hold the bit patterns
(uint16 for BF16, uint8 for the 8-bit floats). Paddle uses the same convention for bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ernie45.errors import CheckpointError

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_CHUNK_ELEMENTS = 1 << 20  # bounds the temporaries of a conversion to a few MB, and keeps them in the cache


@dataclass(frozen=True)
class DtypeInfo:
    """One element type.

    Attributes:
        name: its name in a safetensors header, such as "BF16".
        framework_name: its name in Paddle and PyTorch, such as "bfloat16".
        storage: the numpy dtype (little-endian, as in the file) that holds its bits.
    """

    name: str
    framework_name: str
    storage: np.dtype

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return self.storage.itemsize


DTYPES: dict[str, DtypeInfo] = {
    name: DtypeInfo(name, framework_name, np.dtype(storage))
    for name, framework_name, storage in (
        ("BOOL", "bool", "?"),
        ("U8", "uint8", "u1"),
        ("I8", "int8", "i1"),
        ("F8_E4M3", "float8_e4m3fn", "u1"),
        ("F8_E5M2", "float8_e5m2", "u1"),
        ("U16", "uint16", "<u2"),
        ("I16", "int16", "<i2"),
        ("F16", "float16", "<f2"),
        ("BF16", "bfloat16", "<u2"),
        ("U32", "uint32", "<u4"),
        ("I32", "int32", "<i4"),
        ("F32", "float32", "<f4"),
        ("U64", "uint64", "<u8"),
        ("I64", "int64", "<i8"),
        ("F64", "float64", "<f8"),
    )
}

_BY_FRAMEWORK_NAME = {info.framework_name: info.name for info in DTYPES.values()}


def dtype_from_framework_name(framework_name: str) -> str:
    """The safetensors name of a Paddle or PyTorch dtype: "bfloat16" gives "BF16".

    Raises:
        CheckpointError: no such dtype.
    """
    if framework_name not in _BY_FRAMEWORK_NAME:
        raise CheckpointError(f"unknown dtype {framework_name!r}; known: {', '.join(sorted(_BY_FRAMEWORK_NAME))}")
    return _BY_FRAMEWORK_NAME[framework_name]


def convert(array: np.ndarray, source_dtype: str, target_dtype: str) -> np.ndarray:
    """Convert between the float types BF16, F16, F32 and F64, rounding once, to nearest, ties to even.

    NaN stays NaN, infinities and the sign of zero are kept, and values too large for the target become infinite.

    Args:
        array: any shape, with the storage dtype of `source_dtype` (uint16 for BF16).
        source_dtype: safetensors name of what `array` holds.
        target_dtype: safetensors name of what is wanted.

    Returns:
        An array of the same shape with the storage dtype of `target_dtype`; `array` itself if the types are equal.

    Raises:
        CheckpointError: a type other than the four, or an array that does not have the storage of `source_dtype`.
    """
    for dtype in (source_dtype, target_dtype):
        if dtype not in FLOAT_DTYPES and source_dtype != target_dtype:
            raise CheckpointError(
                f"cannot convert {source_dtype} to {target_dtype}: only {', '.join(FLOAT_DTYPES)} convert"
            )
    if source_dtype not in DTYPES or array.dtype != DTYPES[source_dtype].storage:
        raise CheckpointError(f"cannot convert an array of numpy dtype {array.dtype} as if it held {source_dtype}")
    if source_dtype == target_dtype:
        return array
    source = array.reshape(-1)
    target = np.empty(source.shape, DTYPES[target_dtype].storage)
    for start in range(0, source.size, _CHUNK_ELEMENTS):
        chunk = slice(start, start + _CHUNK_ELEMENTS)
        target[chunk] = _convert_chunk(source[chunk], source_dtype, target_dtype)
    return target.reshape(array.shape)


def _convert_chunk(values: np.ndarray, source_dtype: str, target_dtype: str) -> np.ndarray:
    if source_dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of a float32
    if target_dtype != "BF16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(DTYPES[target_dtype].storage)
    float32 = _narrow_to_odd(values) if source_dtype == "F64" else values.astype(np.float32, copy=False)
    return _round_to_bfloat16(float32)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 [n] to bfloat16 bits [n] as uint16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half_minus_one_plus_parity = 0x7FFF + ((bits >> 16) & 1)
    rounded = (bits + half_minus_one_plus_parity) >> 16
    quiet_nan = (bits >> 16) | 0x0040  # a NaN whose payload sits in the lower half would else become infinity
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def _narrow_to_odd(values: np.ndarray) -> np.ndarray:
    """Narrow float64 [n] to float32 [n], rounding to odd, so that a further rounding to bfloat16 is exact.

    Rounding twice to nearest is wrong beside a tie. Cutting towards zero and setting the last bit of every inexact
    result keeps such values off the tie (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        nearest = values.astype(np.float32)
    inexact = (nearest != values) & ~np.isnan(values)
    went_outwards = np.abs(nearest) > np.abs(values)
    bits = nearest.view(np.uint32)
    odd: np.ndarray = ((bits - (inexact & went_outwards)) | inexact).astype(np.uint32)
    return odd.view(np.float32)
