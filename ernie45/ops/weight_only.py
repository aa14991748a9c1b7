"""Weights of 8 or 4 bits on a GPU, in the layout of Paddle's `weight_only_linear`.

The codes and scales are those of a quantised folder, which CPU kernels read, too; nothing is quantised again. Paddle's
own `weight_quantize` quantises by a rule of its own, so its layout is made here: by columns, inputs within 16 (or 32)
reordered for the tensor cores, columns interleaved by 2 (or 4), codes without a sign. This is what the kernels
`weight_permute_kernel_wint8`, `weight_permute_kernel_wint4` and `weight_interval_kernel_wint4` in the header
`paddle/phi/kernels/impl/weight_quantize_kernel_gpu_impl.h` of Paddle 3.3 do for every GPU since Turing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.quant as quant
from paddle import Tensor

from ernie45.checkpoint.dtypes import convert
from ernie45.errors import ErnieError
from ernie45.ops.packed import GROUP, WINT4, WINT8

INPUTS = 64  # inputs that lie together: a weight has a multiple of them
OUTPUTS = 16  # outputs that the product takes at once
DTYPES = (paddle.float16, paddle.bfloat16)  # of activations
# Where the rows of each 16 go: rows of codes for 8 bits, of bytes with two codes for 4 bits.
PLACES = {
    WINT8: [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15],
    WINT4: [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
}
ROWS = {WINT8: 64, WINT4: 32}  # rows of a column that lie together
COLUMNS = {WINT8: 2, WINT4: 4}  # columns that are interleaved
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # which code of 8 that share 32 bits comes first, second, ...


@dataclass(frozen=True, eq=False)
class WeightOnly:
    """A weight [in, out] for `weight_only_linear`.

    Attributes:
        kind: "wint8" (a scale per output) or "wint4" (a scale per output and 64 inputs).
        codes: int8 [out, in] or [out / 2, in], in the layout of the kernels.
        scales: [out] or [in / 64, out], in the dtype of activations.
    """

    kind: str
    codes: Tensor
    scales: Tensor

    @classmethod
    def from_published(cls, kind: str, codes: np.ndarray, scales: np.ndarray, dtype: str = "bfloat16") -> WeightOnly:
        """A weight as a quantised folder holds it, on the current device.

        Args:
            kind: "wint8" or "wint4".
            codes: int8 [in, out], or [in / 2, out] with two codes a byte, the even input in the low half.
            scales: float32 [out], or bfloat16 bits as uint16 [in / 64, out].
            dtype: of activations, "bfloat16" or "float16"; scales are rounded to it.

        Raises:
            ErnieError: sizes that the kernels do not take.
        """
        inputs, outputs = len(codes) * (2 if kind == WINT4 else 1), codes.shape[1]
        if inputs % INPUTS or outputs % OUTPUTS:
            raise ErnieError(
                f"weight-only: found a weight of {inputs} inputs and {outputs} outputs, expected multiples of {INPUTS} "
                f"and {OUTPUTS}; take it in full precision"
            )
        wide = convert(scales, "BF16", "F32") if kind == WINT4 else scales
        return cls(kind, paddle.to_tensor(arranged(kind, codes)), paddle.to_tensor(wide).astype(dtype))

    @property
    def shape(self) -> list[int]:
        """[in, out]"""
        return [self.codes.shape[1], self.scales.shape[-1]]

    def linear(self, x: Tensor) -> Tensor:
        """x [..., in], in the dtype of the scales, times the weight: [..., out] in that dtype."""
        major, minor = paddle.device.cuda.get_device_capability()
        return quant.weight_only_linear(
            x,
            self.codes,
            weight_scale=self.scales,
            weight_dtype="int4" if self.kind == WINT4 else "int8",
            arch=10 * major + minor,
            group_size=GROUP if self.kind == WINT4 else -1,
        )


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
