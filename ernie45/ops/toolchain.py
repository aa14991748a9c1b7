"""What the CPU operators are compiled with: the processor, the compiler, its flags, and Paddle's libraries."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import paddle

from ernie45.errors import ErnieError

FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-D_GLIBCXX_USE_CXX11_ABI=1",
]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni"]
INSTRUCTION_SETS = {
    "avx512": ["-DERNIE_ISA=avx512", *_AVX512, "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "avx2": ["-DERNIE_ISA=avx2", "-mavx2", "-mfma", "-mf16c"],
}
KERNEL_FLAGS = ["-O3"]
# Bindings only check and call: -O3 would compile Paddle's headers for longer and gain nothing.
BINDING_FLAGS = ["-O2", "-w", "-DPADDLE_WITH_CUSTOM_KERNEL"]
LINK_FLAGS = ["-shared"]

# Paddle's own OpenMP runtime comes first: a second one (libgomp) would fight with it for the cores. All of them are
# in the process already when the library is loaded.
OPENMP = "libiomp5.so"
PADDLE = "libpaddle.so"
LINKED_IF_USED = ["libphi.so", "libphi_core.so", "libphi_gpu.so", "libcommon.so", "libdnnl.so.3"]


class BuildError(ErnieError):
    """Operators cannot be compiled here. The message says why and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, and the first line of what it says about its version."""

    command: tuple[str, ...]
    version: str


def check_platform() -> None:
    """Raises a BuildError unless this is Linux on an x86-64 processor with AVX2, and Paddle has its OpenMP runtime."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise BuildError(f"they are written for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    if not instruction_sets():
        raise BuildError("they need a processor with AVX2, FMA and F16C")
    if find_in_paddle(OPENMP) is None:
        raise BuildError(f"this Paddle comes without {OPENMP}; install the paddlepaddle wheel from PyPI")


def instruction_sets() -> list[str]:
    """Which of the two that kernels are compiled for this processor has, the better one first."""
    match = re.search(r"^flags\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    found = set(match[1].split()) if match else set()
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
    return [name for name, needed in (("avx512", avx512), ("avx2", avx2)) if needed <= found]


def find_compiler() -> Compiler:
    """The compiler in $CXX, otherwise g++.

    Raises:
        BuildError: it is not installed, or does not start.
    """
    command = tuple(shlex.split(os.environ.get("CXX") or "g++"))
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        advice = "install g++ 10 or later (Debian and Ubuntu: apt install g++), or name a C++17 compiler in $CXX"
        raise BuildError(f"no C++ compiler: {shlex.join(command)!r} does not run ({error}); {advice}") from None
    return Compiler(command, result.stdout.partition("\n")[0])


def find_in_paddle(name: str) -> Path | None:
    """A shared library of the Paddle that is running."""
    candidates = (folder / name for folder in library_folders())
    return next((path for path in candidates if path.exists()), None)


def library_folders() -> list[Path]:
    """The two folders in which Paddle keeps its shared libraries."""
    root = Path(paddle.__file__).parent
    return [root / "libs", root / "base"]


def linker_arguments() -> list[str]:
    """Linker arguments for Paddle's libraries and its OpenMP runtime, found again at run time where they are now."""
    folders = [f"-L{folder}" for folder in library_folders()]
    return [*folders, "-Wl,--no-as-needed", f"-l:{OPENMP}", *paddle_libraries()]


def paddle_libraries() -> list[str]:
    """Linker arguments for Paddle's libraries, found again at run time where they are now."""
    folders = [argument for folder in library_folders() for argument in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    used = [f"-l:{name}" for name in LINKED_IF_USED if find_in_paddle(name)]
    return [*folders, "-Wl,--no-as-needed", f"-l:{PADDLE}", "-Wl,--as-needed", *used]


def include_folders() -> list[str]:
    """Where the headers of Paddle and Python are."""
    from paddle.utils.cpp_extension.extension_utils import find_paddle_includes, find_python_includes

    return [*find_paddle_includes(), *find_python_includes()]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
