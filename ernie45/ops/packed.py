"""Weights in the layout of the CPU kernels: a lossless storage of the published tensor, and the way back to it.

It hides the panels (csrc/cpu/packed.h) from everything else: a `PackedWeight` is filled piece by piece with rows of the
published tensor while a checkpoint is read, is multiplied by `ops.linear`, and gives the published tensor back.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace

import numpy as np
import paddle
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.ops import custom

BFLOAT16, WINT8, WINT4 = "bfloat16", "wint8", "wint4"
KINDS = {BFLOAT16: 0, WINT8: 1, WINT4: 2}  # as the kernels number them
PANEL = 64  # output columns that lie together
GROUP = 64  # inputs that share a scale of a 4-bit weight
WORD_ROWS = 4  # rows of inputs that lie together, at most
ALIGNMENT = 4096
LARGE_PAGE = 2**21


class PackedMemory:
    """One piece of memory for many packed weights, in large pages even where a weight is smaller than such a page.

    Args:
        size: bytes that will be taken, each weight rounded up to `ALIGNMENT`.
    """

    def __init__(self, size: int):
        self._block = paddle.empty([size + LARGE_PAGE], dtype="uint8")
        self._next = -self._block.data_ptr() % LARGE_PAGE
        _native().ernie45_use_large_pages(_pointer(self._block), _size(size + LARGE_PAGE))

    def take(self, size: int) -> Tensor:
        """The next `size` bytes, as a view."""
        first = self._next
        self._next += aligned(size)
        return self._block[first : first + size]


def aligned(size: int) -> int:
    """Bytes that a weight of this size takes from a `PackedMemory`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def packed_bytes(kind: str, shape: list[int], *, outputs_first: bool = False) -> int:
    """Bytes of a packed weight of this published shape, without the scales of wint8."""
    inputs, outputs = shape[-2:][::-1] if outputs_first else shape[-2:]
    count = math.prod(shape[:-2])
    return int(_native().ernie45_packed_bytes(KINDS[kind], _size(inputs), _size(outputs))) * count


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight, or several stacked ones of the same shape, laid out for the CPU kernels.

    Attributes:
        kind: "bfloat16", "wint8" (a float32 scale per output) or "wint4" (a bfloat16 scale per output and 64 inputs).
        in_features, out_features: of one matrix.
        count: number of stacked matrices; None: it is one matrix, not a stack of one.
        outputs_first: the published tensor is [out, in], like an embedding, instead of [in, out].
        data: uint8, the panels.
        scales: float32 [count * padded out] for wint8, else None.
    """

    kind: str
    in_features: int
    out_features: int
    count: int | None
    outputs_first: bool
    data: Tensor
    scales: Tensor | None

    @classmethod
    def zeros(
        cls, kind: str, shape: list[int], *, outputs_first: bool = False, memory: PackedMemory | None = None
    ) -> PackedWeight:
        """A weight of this published shape ([in, out], or [experts, in, out] for a stack) that holds zeros.

        Args:
            kind: "bfloat16", "wint8" or "wint4".
            shape: of the published tensor.
            outputs_first: the published tensor is [out, in].
            memory: where to put it; None: memory of its own.

        Raises:
            ErnieError: the native library is not there.
        """
        *stack, rows, columns = shape
        inputs, outputs = (columns, rows) if outputs_first else (rows, columns)
        count, matrices = (stack[0], stack[0]) if stack else (None, 1)
        size = packed_bytes(kind, shape, outputs_first=outputs_first)
        data = paddle.empty([size], dtype="uint8") if memory is None else memory.take(size)
        padded = -(-outputs // PANEL) * PANEL * matrices
        scales = paddle.zeros([padded], dtype="float32") if kind == WINT8 else None
        weight = cls(kind, inputs, outputs, count, outputs_first, data, scales)
        _native().ernie45_clear_packed(*weight._form, _size(matrices), _pointer(data))
        return weight

    @property
    def shape(self) -> list[int]:
        """Shape of the published tensor."""
        matrix = [self.in_features, self.out_features]
        return [*([] if self.count is None else [self.count]), *(matrix[::-1] if self.outputs_first else matrix)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.shape[0] + (0 if self.scales is None else 4 * self.scales.shape[0])

    def __getitem__(self, index: int) -> PackedWeight:
        """One matrix of a stack, as a view."""
        if self.count is None or not 0 <= index < self.count:
            raise IndexError(f"packed weight: no matrix {index} in a stack of {self.count}")
        size = self.data.shape[0] // self.count
        scales = None
        if self.scales is not None:
            padded = self.scales.shape[0] // self.count
            scales = self.scales[index * padded : (index + 1) * padded]
        return replace(self, count=None, data=self.data[index * size : (index + 1) * size], scales=scales)

    def outputs(self, first: int, last: int) -> PackedWeight:
        """Outputs first .. last - 1 of a matrix, as a view.

        Raises:
            ErnieError: they are no outputs of the matrix, or `first` is not a multiple of 64.
        """
        if self.count is not None or first % PANEL or not 0 <= first <= last <= self.out_features:
            raise ErnieError(
                f"packed weight {self.shape}: no outputs {first} to {last}; they begin at a multiple of {PANEL} of one "
                f"matrix with {self.out_features}"
            )
        panels, size = -(-(last - first) // PANEL), self.data.shape[0] // max(1, -(-self.out_features // PANEL))
        data = self.data[first // PANEL * size : (first // PANEL + panels) * size]
        scales = None if self.scales is None else self.scales[first : first + panels * PANEL]
        return replace(self, out_features=last - first, data=data, scales=scales)

    def write(self, rows: np.ndarray, first: int = 0) -> None:
        """Fills in rows first, first + 1, ... of the published tensor.

        Args:
            rows: bfloat16 bits as uint16 [rows, columns]; int8 codes for wint8; for wint4 bytes of two codes each, the
                even input in the low half: [in / 2, out], or [out, in / 2] if outputs come first.
            first: the first row, a multiple of 4 unless outputs come first.

        Raises:
            ErnieError: the rows do not fit, or `first` is not such a multiple.
        """
        rows = np.ascontiguousarray(rows)
        height, width = self._plain_shape
        fits = rows.ndim == 2 and rows.shape[1] == width and 0 <= first <= height - len(rows)
        if not fits or rows.itemsize != self._item_size:
            raise ErnieError(
                f"packed weight: {rows.dtype} {list(rows.shape)} from row {first} on do not fit into "
                f"{height} rows of {width} ({self.kind})"
            )
        if first % WORD_ROWS and not self.outputs_first:
            raise ErnieError(f"packed weight: rows must begin at a multiple of {WORD_ROWS}, found {first}")
        _native().ernie45_pack(
            *self._form, int(self.outputs_first), _size(first), _size(len(rows)), _address(rows), _pointer(self.data)
        )

    def write_scales(self, scales: np.ndarray) -> None:
        """Fills in the scales: float32 [out] for wint8, bfloat16 bits [ceil(in / 64), out] for wint4."""
        if self.scales is not None:
            self.scales[: self.out_features] = paddle.to_tensor(np.array(scales, dtype=np.float32))
            return
        scales = np.array(scales.T if self.outputs_first else scales, dtype=np.uint16, order="C")
        _native().ernie45_pack_scales(*self._form[1:], 0, _address(scales), _pointer(self.data))

    def codes(self) -> np.ndarray:
        """What `write` takes, for the whole matrix."""
        codes = np.empty(self._plain_shape, np.uint16 if self.kind == BFLOAT16 else np.int8)
        _native().ernie45_unpack(
            *self._form, int(self.outputs_first), _size(0), _size(len(codes)), _pointer(self.data), _address(codes)
        )
        return codes

    def scale_values(self) -> np.ndarray:
        """What `write_scales` takes."""
        if self.scales is not None:
            return self.scales[: self.out_features].numpy()
        scales = np.zeros((-(-self.in_features // GROUP), self.out_features), np.uint16)
        _native().ernie45_pack_scales(*self._form[1:], 1, _address(scales), _pointer(self.data))
        return scales.T.copy() if self.outputs_first else scales

    def columns(self, ids: Tensor) -> Tensor:
        """The weights of some outputs, float32 [..., in] for ids [...] int64: the rows of an embedding.

        Raises:
            ErnieError: an id is not one of the outputs.
        """
        flat = np.ascontiguousarray(ids.numpy()).reshape(-1)
        if flat.size and not 0 <= flat.min() <= flat.max() < self.out_features:
            raise ErnieError(f"ids {flat.min()} to {flat.max()} are outside 0 to {self.out_features - 1}")
        result = paddle.empty([*ids.shape, self.in_features], dtype="float32")
        _native().ernie45_packed_columns(
            *self._form,
            _pointer(self.data),
            None if self.scales is None else _pointer(self.scales),
            _address(flat),
            _size(flat.size),
            _pointer(result),
        )
        return result

    def dense(self) -> Tensor:
        """The weights of one matrix in float32 [in, out]: the definition of what it stands for."""
        return self.columns(paddle.arange(self.out_features)).T

    @property
    def _form(self) -> tuple[int, ctypes.c_int64, ctypes.c_int64]:
        return KINDS[self.kind], _size(self.in_features), _size(self.out_features)

    @property
    def _plain_shape(self) -> tuple[int, int]:
        inputs = -(-self.in_features // 2) if self.kind == WINT4 else self.in_features
        return (self.out_features, inputs) if self.outputs_first else (inputs, self.out_features)

    @property
    def _item_size(self) -> int:
        return 2 if self.kind == BFLOAT16 else 1


_size = ctypes.c_int64


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _native() -> ctypes.CDLL:
    library = custom.library()
    if library is None:
        raise ErnieError(f"packed weights need the fused CPU operators: {custom.loaded().why_not}")
    library.ernie45_packed_bytes.restype = ctypes.c_int64
    return library
