"""Weights of 8 or 4 bits on a GPU, in the layout of Paddle's `weight_only_linear`.

The codes and scales are those of a quantised folder, which CPU kernels read, too; nothing is quantised again. Paddle's
own `weight_quantize` quantises by a rule of its own, so its layout is made here: by columns, inputs within 16 (or 32)
reordered for the tensor cores, columns interleaved by 2 (or 4), codes without a sign. This is what the kernels
`weight_permute_kernel_wint8`, `weight_permute_kernel_wint4` and `weight_interval_kernel_wint4` in the header
`paddle/phi/kernels/impl/weight_quantize_kernel_gpu_impl.h` of Paddle 3.3 do for every GPU since Turing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import paddle
import paddle.nn.quant as quant
from paddle import Tensor

from ernie45.checkpoint.dtypes import convert
from ernie45.errors import ErnieError
from ernie45.ops.packed import GROUP, WINT4, WINT8

INPUTS = 64  # inputs that lie together: a weight has a multiple of them
OUTPUTS = 16  # outputs that the product takes at once
DTYPES = ("bfloat16", "float16")  # of activations
ARCHITECTURES = (80, 86, 89, 90, 92, 100)  # compute capabilities that Paddle 3.3 knows of; newer GPUs run the last
# Where the rows of each 16 go: rows of codes for 8 bits, of bytes with two codes for 4 bits.
PLACES = {
    WINT8: [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15],
    WINT4: [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
}
ROWS = {WINT8: 64, WINT4: 32}  # rows of a column that lie together
COLUMNS = {WINT8: 2, WINT4: 4}  # columns that are interleaved
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # which code of 8 that share 32 bits comes first, second, ...


def takes(shape: Sequence[int]) -> bool:
    """Whether the kernels take a weight [..., in, out] of this shape."""
    return shape[-2] % INPUTS == 0 and shape[-1] % OUTPUTS == 0


@dataclass(eq=False)
class WeightOnly:
    """A weight [in, out] for `weight_only_linear`, for inference: it has no gradient.

    It is made empty, then filled as a quantised folder holds it, like a `PackedWeight` of the CPU.

    Attributes:
        kind: "wint8" (a scale per output) or "wint4" (a scale per output and 64 inputs).
        shape: [in, out]
        dtype: of activations, "bfloat16" or "float16"; scales are rounded to it.
        data: int8 [out, in] or [out / 2, in], in the layout of the kernels.
        scales: [out] or [in / 64, out], in that dtype.

    Raises:
        ErnieError: sizes that the kernels do not take, or another kind or dtype.
    """

    kind: str
    shape: list[int]
    dtype: str = "bfloat16"
    data: Tensor = field(init=False)
    scales: Tensor = field(init=False)

    outputs_first = False

    def __post_init__(self) -> None:
        if self.kind not in PLACES or self.dtype not in DTYPES:
            raise ErnieError(
                f"weight-only: found {self.kind!r} with {self.dtype!r}, expected {' or '.join(map(repr, PLACES))} with "
                f"{' or '.join(map(repr, DTYPES))}"
            )
        if len(self.shape) != 2 or not takes(self.shape):
            raise ErnieError(
                f"weight-only: found a weight of shape {self.shape}, expected [in, out], multiples of {INPUTS} and "
                f"{OUTPUTS}; take it in full precision"
            )
        self._codes: np.ndarray | None = None  # while it is filled

    @property
    def nbytes(self) -> int:
        """Bytes held, once it is filled."""
        return self.data.size + 2 * self.scales.size

    @property
    def _rows(self) -> tuple[int, int]:
        return self.shape[0] // (2 if self.kind == WINT4 else 1), self.shape[1]

    def write(self, rows: np.ndarray, first: int = 0) -> None:
        """Fills in rows first, first + 1, ... of the codes: int8 [in, out], or for wint4 bytes [in / 2, out] of two
        codes each, the even input in the low half.

        Raises:
            ErnieError: they do not fit.
        """
        height, width = self._rows
        if rows.ndim != 2 or rows.shape[1] != width or not 0 <= first <= height - len(rows) or rows.itemsize != 1:
            raise ErnieError(
                f"weight-only: {rows.dtype} {list(rows.shape)} from row {first} on do not fit into {height} rows of "
                f"{width} ({self.kind})"
            )
        if self._codes is None:
            self._codes = np.zeros(self._rows, np.int8)
        self._codes[first : first + len(rows)] = rows

    def write_scales(self, scales: np.ndarray) -> None:
        """Fills in the scales, float32 [out] or bfloat16 bits as uint16 [in / 64, out]; call it after `write`.

        Codes and scales then are on the current device, and nowhere else.
        """
        assert self._codes is not None, "write comes first"
        wide = convert(scales, "BF16", "F32") if self.kind == WINT4 else scales
        self.data = paddle.to_tensor(arranged(self.kind, self._codes))
        self.scales = paddle.to_tensor(wide).astype(self.dtype)
        self._codes = None

    def codes(self) -> np.ndarray:
        """What `write` took, for the whole weight."""
        return published(self.kind, self.data.numpy())

    def scale_values(self) -> np.ndarray:
        """What `write_scales` took, as far as the dtype of activations holds it."""
        wide = self.scales.astype("float32").numpy()
        return convert(wide, "F32", "BF16") if self.kind == WINT4 else wide

    @functools.cached_property
    def _architecture(self) -> int:
        """Of the kernels that run it: asked for once, not in every product."""
        major, minor = paddle.device.cuda.get_device_capability()
        return max(known for known in ARCHITECTURES if known <= max(10 * major + minor, ARCHITECTURES[0]))

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight: [..., out] in the dtype of x."""
        return quant.weight_only_linear(
            x.astype(self.dtype),
            self.data,
            weight_scale=self.scales,
            weight_dtype="int4" if self.kind == WINT4 else "int8",
            arch=self._architecture,
            group_size=GROUP if self.kind == WINT4 else -1,
        ).astype(x.dtype)


class WeightOnlyStack(Sequence[WeightOnly]):
    """The weights of a bank of experts, [count, in, out]; see `WeightOnly`."""

    def __init__(self, kind: str, shape: list[int], dtype: str = "bfloat16"):
        self.shape = shape
        self._weights = [WeightOnly(kind, shape[1:], dtype) for _ in range(shape[0])]

    @overload
    def __getitem__(self, index: int) -> WeightOnly: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[WeightOnly]: ...
    def __getitem__(self, index: int | slice) -> WeightOnly | Sequence[WeightOnly]:
        return self._weights[index]

    def __len__(self) -> int:
        return len(self._weights)


def arranged(kind: str, codes: np.ndarray) -> np.ndarray:
    """Codes [rows, out] of a quantised folder in the layout of the kernels: int8 [out, in] or [out / 2, in]."""
    rows, outputs = codes.shape
    by_column = codes.T.reshape(outputs, rows // 16, 16)
    ordered = np.empty_like(by_column)
    ordered[:, :, PLACES[kind]] = by_column
    blocks = ordered.reshape(outputs // COLUMNS[kind], COLUMNS[kind], rows // ROWS[kind], ROWS[kind])
    interleaved = np.ascontiguousarray(blocks.swapaxes(1, 2)).view(np.uint8)
    if kind == WINT8:
        return (interleaved ^ 0x80).view(np.int8).reshape(outputs, rows)
    words = interleaved.reshape(-1).view("<u4")
    moved = sum(((words >> 4 * source) & 0xF ^ 8) << 4 * place for place, source in enumerate(NIBBLES))
    return np.asarray(moved, "<u4").view(np.int8).reshape(outputs // 2, 2 * rows)


def published(kind: str, data: np.ndarray) -> np.ndarray:
    """The inverse of `arranged`."""
    if kind == WINT8:
        outputs, rows = data.shape
        interleaved = data.view(np.uint8) ^ 0x80
    else:
        outputs, rows = 2 * data.shape[0], data.shape[1] // 2
        words = np.ascontiguousarray(data).reshape(-1).view("<u4")
        moved = sum(((words >> 4 * place) & 0xF ^ 8) << 4 * source for place, source in enumerate(NIBBLES))
        interleaved = np.asarray(moved, "<u4").view(np.uint8)
    blocks = interleaved.reshape(outputs // COLUMNS[kind], rows // ROWS[kind], COLUMNS[kind], ROWS[kind])
    ordered = blocks.swapaxes(1, 2).reshape(outputs, rows // 16, 16)
    return np.ascontiguousarray(ordered[:, :, PLACES[kind]].reshape(outputs, rows).T).view(np.int8)
