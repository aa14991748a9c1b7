"""The CUDA kernels compiled for the host (see ``cuda_emulator``), and memory for them that notices what it should not.

Needs only g++. A library is kept in the cache folder under the hash of what it was made from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ernie45.checkpoint.dtypes import convert
from ernie45.ops import build
from tools.gpu.library import DTYPES, HEADERS, CudaError, Library

__all__ = ["DTYPES", "FLOATS", "CudaError", "Library", "Memory", "device", "empty", "library", "library_of"]

EMULATOR = Path(__file__).with_name("cuda_emulator")
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
    # Fibers jump between their stacks, which a hardened longjmp takes for an attack.
    *("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"),
    # Misaligned accesses and undefined arithmetic trap, and the emulator makes an error of that.
    *("-fsanitize=alignment,bounds,integer-divide-by-zero,shift", "-fsanitize-undefined-trap-on-error"),
]
FLOATS = ("float32", "float16", "bfloat16")
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "float8_e4m3fn": np.uint8}


@functools.cache
def library(*names: str) -> Library:
    """The functions of ``csrc/cuda/NAME.cu``, of all files without a name, on the host. Skips without a compiler."""
    return library_of([HEADERS / f"{name}.cu" for name in names] if names else sorted(HEADERS.glob("*.cu")))


def library_of(files: list[Path], headers: Path = HEADERS) -> Library:
    """The functions of these files, which the headers in a folder declare."""
    return Library(compiled(files), headers)


def compiled(files: list[Path]) -> list[Path]:
    """The shared libraries that these files become on the host. Skips without a compiler."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} to compile kernels with")
    return [_compiled(file, compiler) for file in files]


def _compiled(file: Path, compiler: list[str]) -> Path:
    read = [*_with_headers(file), *sorted(EMULATOR.glob("*.h"))]
    digest = hashlib.sha256("\0".join([*compiler, *FLAGS, *(path.read_text("utf-8") for path in read)]).encode())
    target = build.cache_folder() / "emulated" / f"{file.stem}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        command = [*compiler, *FLAGS, f"-I{EMULATOR}", f"-I{HEADERS}", "-x", "c++", str(file), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        os.replace(made, target)
    return target


def _with_headers(file: Path) -> list[Path]:
    """This file and those of ours that it includes, so that a change compiles only what it concerns."""
    found, waiting = set(), [file]
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in found:
            found.add(path)
            names = re.findall(r'^#include "([^"]+)"', path.read_text("utf-8"), re.MULTILINE)
            waiting += [folder / name for name in names for folder in (path.parent, HEADERS)]
    return sorted(found)


class Memory:
    """An array in memory of its own, between two stretches that kernels must leave as they are.

    Args:
        stored: what it holds: float32, float16, bfloat16 as uint16, codes as uint8, or integers.
        dtype: its name, such as "bfloat16".
        shift: elements by which it misses a multiple of 64 bytes.
    """

    GUARD = 256
    PATTERN = 0xFF  # read as any float, NaN

    def __init__(self, stored: np.ndarray, dtype: str, shift: int = 0) -> None:
        self.dtype = dtype
        self.shape = stored.shape
        skipped = self.GUARD + shift * stored.itemsize
        self._bytes = np.full(skipped + stored.nbytes + self.GUARD + 64, self.PATTERN, np.uint8)
        self._first = -self._bytes.ctypes.data % 64 + skipped
        self._last = self._first + stored.nbytes
        self._bytes[self._first : self._last] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        self._kind = stored.dtype

    @property
    def tag(self) -> int:
        """What functions take as `dtype`."""
        return DTYPES[self.dtype]

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self._bytes.ctypes.data + self._first

    def stored(self) -> np.ndarray:
        """The array as it is stored now. Nothing around it may have changed."""
        for name, guard in (("before", self._bytes[: self._first]), ("behind", self._bytes[self._last :])):
            assert (guard == self.PATTERN).all(), f"something was written {name} an array"
        return self._bytes[self._first : self._last].view(self._kind).reshape(self.shape).copy()

    def numpy(self) -> np.ndarray:
        """The array as float32, or as it is stored if it holds no floating point numbers of 16 bits or more."""
        stored = self.stored()
        return convert(stored, SAFETENSORS[self.dtype], "F32") if self.dtype in SAFETENSORS else stored


def device(array: np.ndarray, dtype: str | None = None, shift: int = 0) -> Memory:
    """The values of an array: float32 rounded to a floating point dtype; others as they are."""
    dtype = dtype or str(array.dtype)
    if dtype in SAFETENSORS:
        array = convert(np.ascontiguousarray(array, np.float32), "F32", SAFETENSORS[dtype])
    return Memory(array, dtype, shift)


def empty(shape: tuple[int, ...] | list[int], dtype: str = "float32", shift: int = 0) -> Memory:
    """An array that nobody has written: NaN, or a number that is unlikely to be right."""
    stored = np.zeros(shape, STORED.get(dtype, dtype))
    memory = Memory(stored, dtype, shift)
    ctypes.memset(memory.data_ptr(), Memory.PATTERN, stored.nbytes)
    return memory
