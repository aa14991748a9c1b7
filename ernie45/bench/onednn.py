"""The rate of matrix products in oneDNN, called through its C interface (version 3) without headers.

The library comes with Paddle (`paddle/libs`). Constants are those of its `dnnl_types.h`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

DTYPES = {"bfloat16": 2, "float32": 3}  # dnnl_data_type_t
CPU, DEFAULT_STREAM = 1, 1  # dnnl_cpu, dnnl_stream_default_flags
ANY_LAYOUT, ROWS = 1, 3  # dnnl_format_tag_any, dnnl_ab
QUERY_WEIGHTS = 131  # dnnl_query_weights_md
SOURCE, DESTINATION, WEIGHTS = 1, 17, 33  # DNNL_ARG_*
ALLOCATE = ctypes.c_void_p(-1)  # DNNL_MEMORY_ALLOCATE

Handle = ctypes.c_void_p


class _Argument(ctypes.Structure):
    """dnnl_exec_arg_t."""

    _fields_ = [("index", ctypes.c_int), ("memory", Handle)]


class Product:
    """One matrix product [rows, inputs] x [inputs, outputs], the weights in the layout that oneDNN picks.

    Args:
        library: oneDNN, loaded.
        dtype: "float32" or "bfloat16", of all three matrices.

    Raises:
        OSError: oneDNN refuses, for example on a processor without this dtype.
    """

    def __init__(self, library: ctypes.CDLL, dtype: str, rows: int, inputs: int, outputs: int):
        self.library = library
        library.dnnl_primitive_desc_query_md.restype = Handle
        self.operations = 2 * rows * inputs * outputs
        self.engine = self._create("engine_create", CPU, ctypes.c_size_t(0))
        self.stream = self._create("stream_create", self.engine, DEFAULT_STREAM)
        source, destination = (self._layout([rows, size], dtype, ROWS) for size in (inputs, outputs))
        free = self._layout([inputs, outputs], dtype, ANY_LAYOUT)
        none = Handle()
        description = self._create("matmul_primitive_desc_create", self.engine, source, free, none, destination, none)
        packed = Handle(library.dnnl_primitive_desc_query_md(description, QUERY_WEIGHTS, 0))
        self.primitive = self._create("primitive_create", description)
        self.arguments = self._arguments({SOURCE: source, WEIGHTS: packed, DESTINATION: destination})

    def run(self) -> None:
        """Computes the product once."""
        self._call("primitive_execute", self.primitive, self.stream, len(self.arguments), ctypes.byref(self.arguments))
        self._call("stream_wait", self.stream)

    def rate(self, seconds: float) -> float:
        """Operations per second of the fastest run within about `seconds`."""
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            self.run()
            best = min(best, time.perf_counter() - start)
        return self.operations / best

    def _layout(self, shape: Sequence[int], dtype: str, tag: int) -> Handle:
        dimensions = (ctypes.c_int64 * 12)(*shape)
        return self._create("memory_desc_create_with_tag", len(shape), dimensions, DTYPES[dtype], tag)

    def _arguments(self, layouts: dict[int, Handle]) -> Any:
        """Zeroed memory for each argument: the time of a product does not depend on its numbers."""
        arguments = (_Argument * len(layouts))()
        for argument, (index, layout) in zip(arguments, layouts.items(), strict=True):
            argument.index = index
            argument.memory = self._create("memory_create", layout, self.engine, ALLOCATE)
            self._fill_with_zeros(Handle(argument.memory), layout)
        return arguments

    def _fill_with_zeros(self, memory: Handle, layout: Handle) -> None:
        data = Handle()
        self._call("memory_get_data_handle", memory, ctypes.byref(data))
        self.library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
        ctypes.memset(data, 0, self.library.dnnl_memory_desc_get_size(layout))

    def _create(self, function: str, *arguments: Any) -> Handle:
        created = Handle()
        self._call(function, ctypes.byref(created), *arguments)
        return created

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.library, f"dnnl_{function}")(*arguments)
        if status:
            raise OSError(f"oneDNN: dnnl_{function} failed with status {status}")
