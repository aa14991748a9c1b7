"""What this machine can do at best: reading memory, and products of matrices."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle

from ernie45.bench.onednn import Product
from ernie45.ops import custom
from ernie45.runtime import set_num_threads

READ_BYTES = 2**29  # far more than caches hold
ROWS = 512
SHAPES = ((1024, 6144), (3072, 1024))  # inputs and outputs of the 0.3B model's feed-forward
SECONDS = 0.05  # for each of the products


class Machine:
    """Measures the limits; lives in a worker, so that they can be measured again between other measurements.

    Args:
        threads: threads that read and compute.
    """

    def __init__(self, threads: int):
        set_num_threads(threads)
        self.threads = threads
        self.data = np.ones(READ_BYTES // 4, np.float32)
        self.pool = ThreadPoolExecutor(threads)
        self.square = paddle.ones([1024, 1024])
        custom.library()  # built now if it has to be, not within a measurement
        self.products = {dtype: self._products(dtype) for dtype in ("float32", "bfloat16")}

    def measure(self) -> dict[str, float]:
        """Bytes read per second ("bandwidth"), and operations per second ("float32", "bfloat16").

        bfloat16 is 0 where the processor or oneDNN cannot multiply it.
        """
        return {
            "bandwidth": max(self._bandwidth_of_numpy(), self._bandwidth_of_library()),
            "float32": max(self._rate_of_paddle(), self._rate_of_onednn("float32")),
            "bfloat16": self._rate_of_onednn("bfloat16"),
        }

    def describe(self) -> dict[str, str | int]:
        """Processor, threads and Paddle's version."""
        return {"processor": processor_name(), "threads": self.threads, "paddle": paddle.__version__}

    def _bandwidth_of_numpy(self) -> float:
        parts = np.array_split(self.data, self.threads)
        return self.data.nbytes / best_seconds(lambda: list(self.pool.map(np.max, parts)), 2)

    def _bandwidth_of_library(self) -> float:
        """The plain sum of the native library; 0 without a library."""
        library = custom.library()
        if library is None:
            return 0.0
        read = library.ernie45_read_bandwidth
        read.restype, read.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_int64]
        return max(read(self.data.ctypes.data, self.data.nbytes) for _ in range(4))

    def _rate_of_paddle(self) -> float:
        return 2 * 1024**3 / best_seconds(lambda: paddle.matmul(self.square, self.square), 3)

    def _rate_of_onednn(self, dtype: str) -> float:
        return max((product.rate(SECONDS) for product in self.products[dtype]), default=0.0)

    def _products(self, dtype: str) -> list[Product]:
        """Products in this dtype, none where oneDNN is missing or refuses."""
        try:
            library = ctypes.CDLL(str(Path(paddle.__file__).parent / "libs" / "libdnnl.so.3"))
            return [Product(library, dtype, ROWS, inputs, outputs) for inputs, outputs in SHAPES]
        except OSError:
            return []


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def processor_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
