"""Calls the functions that the headers in ``csrc/cuda`` declare, through ctypes: neither Paddle nor a build of ours.

Arguments are tensors of PyTorch, or anything else with `data_ptr()`, numbers, and None for a null pointer. Dtype tags
are in `DTYPES`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEADERS = Path(__file__).parent.parent.parent / "ernie45" / "ops" / "csrc" / "cuda"
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3fn": 3}

_DECLARATION = re.compile(r"^ERNIE45_API\s+(\w+)\s+(ernie45_cuda_\w+)\(([^)]*)\);", re.MULTILINE)
_NUMBERS = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "bool": ctypes.c_bool,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "size_t": ctypes.c_size_t,
}


class CudaError(RuntimeError):
    """A function returned something else than cudaSuccess. `code` is the cudaError_t."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name}: cudaError_t {code}")
        self.code = code


class Library:
    """The functions of shared libraries, with the types that the headers give their parameters.

    Args:
        files: the shared libraries; a function is taken from the first that has it.
        headers: the folder of the headers that declare the functions.
        stream: the CUDA stream, as an address, that functions which take one run on.
    """

    def __init__(self, files: Iterable[Path | str], headers: Path = HEADERS, stream: int = 0) -> None:
        self.stream = stream
        self._libraries = [ctypes.CDLL(str(file)) for file in files]
        self._declared = {
            name: (result, [_parameter(text) for text in parameters.split(",")])
            for header in sorted(headers.glob("*.h"))
            for result, name, parameters in _DECLARATION.findall(header.read_text(encoding="utf-8"))
        }

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function; where its last parameter is a stream, that is added.

        Returns:
            What a function that returns a number returns, 0 for others.

        Raises:
            CudaError: it returned an error.
            TypeError: the wrong number of arguments, or a kind that its parameter cannot be.
        """
        result, parameters = self._declared[name]
        if parameters[-1][0] == "cudaStream_t":
            arguments = (*arguments, self.stream)
        if len(arguments) != len(parameters):
            expected = ", ".join(f"{kind} {of}" for kind, of in parameters)
            raise TypeError(f"{name} takes ({expected}), found {len(arguments)} arguments")
        found = self._function(name, result)(
            *(_argument(name, kind, of, value) for (kind, of), value in zip(parameters, arguments, strict=True))
        )
        if result == "cudaError_t" and found != 0:
            raise CudaError(name, found)
        return found

    def _function(self, name: str, result: str) -> Any:
        for library in self._libraries:
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = _NUMBERS.get(result, ctypes.c_int)
                return function
        raise AttributeError(f"no library has {name}")


def _parameter(text: str) -> tuple[str, str]:
    """("pointer", "x") of "const float* x", ("int64_t", "rows") of "int64_t rows"."""
    kind, _, name = text.strip().rpartition(" ")
    return "pointer" if "*" in kind else kind.removeprefix("const ").strip(), name


def _argument(function: str, kind: str, name: str, value: Any) -> Any:
    if kind in ("pointer", "cudaStream_t"):
        if value is None or isinstance(value, int):
            return ctypes.c_void_p(value)
        if hasattr(value, "data_ptr"):
            return ctypes.c_void_p(value.data_ptr())
    elif kind in _NUMBERS and isinstance(value, (bool, int, float)):
        return _NUMBERS[kind](value)
    raise TypeError(f"{function}: {name} is {value!r}, expected {'a tensor or None' if kind == 'pointer' else kind}")
