"""The fused CPU operators: loaded at first use, and the reference wherever they cannot be.

Environment:
    ERNIE45_OPS: ``reference`` uses the definitions in plain Paddle everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor

from ernie45 import runtime
from ernie45.errors import ErnieError
from ernie45.ops import build, toolchain

# As the library numbers them.
INSTRUCTION_SETS = {"avx2": 1, "avx512": 2}


class ReferencePathWarning(UserWarning):
    """The fused operators cannot be used here, and the slower definitions in plain Paddle are."""


@dataclass(frozen=True)
class Loaded:
    """The library of this process: its file and operators, or why there is none."""

    library: ctypes.CDLL | None
    file: Path | None
    operators: tuple[str, ...]
    why_not: str = ""


_loaded: Loaded | None = None
_load_lock = threading.Lock()
_reference_depth = 0
# Where no tensor can be anywhere else, asking each one for its place would cost more than the rest of `usable`.
_only_cpu = not (
    paddle.is_compiled_with_cuda() or paddle.is_compiled_with_xpu() or paddle.device.get_all_custom_device_type()
)


def library() -> ctypes.CDLL | None:
    """The native library, built and loaded at the first call; None, after one warning, where that is impossible."""
    return loaded().library


def loaded() -> Loaded:
    """What the first call, here or in ``library``, found."""
    global _loaded
    if _loaded is None:
        with _load_lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def usable(*tensors: Tensor) -> bool:
    """Whether fused operators take these tensors: the library is there, they are on the CPU, nothing forbids it.

    What is not a tensor with numbers (a variable of a program that ``paddle.jit`` traces) takes the reference.
    """
    if _reference_depth or loaded().library is None:
        return False
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not (_only_cpu or tensor.place.is_cpu_place()):
            return False
    return True


def run(name: str, *arguments: Any) -> list[Tensor]:
    """Run a fused operator: its inputs, then its attributes, in the order of their declaration."""
    return paddle._C_ops._run_custom_op(name, *arguments)


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Inside, every operator of this process, in all threads, is its definition in plain Paddle."""
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Inside, the kernels for "avx512" or "avx2" are used; for tests.

    Raises:
        ErnieError: another name, no library, or a processor without it.
    """
    if name not in INSTRUCTION_SETS:
        raise ErnieError(f"instruction_set: found {name!r}, expected one of {', '.join(INSTRUCTION_SETS)}")
    native = library()
    if native is None:
        raise ErnieError(f"instruction_set: {name} needs the native library: {loaded().why_not}")
    before = native.ernie45_isa()
    if not native.ernie45_set_isa(INSTRUCTION_SETS[name]):
        raise ErnieError(
            f"instruction_set: this processor lacks {name}; it has {', '.join(toolchain.instruction_sets())}"
        )
    try:
        yield
    finally:
        native.ernie45_set_isa(before)


def wants_reference() -> bool:
    """Whether every operator is to be its definition: inside `reference_only`, or because the user says so."""
    return _reference_depth > 0 or os.environ.get("ERNIE45_OPS") == "reference"


def load(what: str, library_file: Callable[[], Path]) -> Loaded:
    """Register the operators of a library; without it there is one warning, unless the user switched building off.

    Args:
        what: is loaded, such as "CPU operators".
        library_file: finds the library or builds it.
    """
    if os.environ.get("ERNIE45_OPS") == "reference":
        return Loaded(None, None, (), "ERNIE45_OPS=reference")
    try:
        file = library_file()
        # The same file opened twice is one library: C functions and operators share their state.
        operators = paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(file))
        return Loaded(ctypes.CDLL(str(file)), file, tuple(operators))
    except (toolchain.BuildError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get("ERNIE45_BUILD") != "0":
            warnings.warn(f"ernie45: no fused {what}: {error}", ReferencePathWarning, stacklevel=5)
        return Loaded(None, None, (), str(error))


def _load() -> Loaded:
    found = load("CPU operators", build.library_file)
    if found.library is not None:
        runtime.follow_threads(found.library.ernie45_set_num_threads)
    return found
