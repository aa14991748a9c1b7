"""Compiles the CUDA operators in ``csrc/cuda`` and ``csrc/cuda_bindings`` into a shared library, as ``build`` does.

Kernels are compiled by nvcc; the operators that call them are plain C++ and are compiled by the C++ compiler.

Environment, beside that of ``build`` and ``make``:
    CUDA_HOME, NVCC: where the CUDA toolkit is, and its compiler; otherwise the nvcc of the search path.
    ERNIE45_CUDA_ARCH: compute capabilities to compile for, such as ``80;90a``; otherwise those of the GPUs here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import paddle

from ernie45.ops import build, make
from ernie45.ops.make import Recipe, Unit, cache_folder, files_in
from ernie45.ops.toolchain import (
    BuildError,
    Compiler,
    find_compiler,
    include_folders,
    paddle_libraries,
)

# What a library that comes with the package is compiled for. Code for 8.0 runs on all 8.x; 9.0a has Hopper's own
# instructions, and what comes after Hopper compiles the intermediate code for 9.0 when it loads it.
ARCHITECTURES = ("80", "90a")
INTERMEDIATE = "90"
OLDEST = (8, 0)

KERNEL_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
BINDING_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-DPADDLE_WITH_CUDA"]
# The runtime is linked in, so that the library does not depend on which one Paddle brings.
LINK_FLAGS = ["-shared", "-Wl,--exclude-libs,ALL"]
RUNTIME = ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its compiler, and the line of what that says about its version."""

    home: Path
    nvcc: Path
    version: str

    @property
    def includes(self) -> list[str]:
        """The folders of its headers. Since CUDA 13, those of its C++ libraries are a folder further down."""
        return [str(folder) for folder in (self.home / "include", self.home / "include" / "cccl") if folder.is_dir()]

    @property
    def libraries(self) -> list[str]:
        """The folders of its libraries."""
        return [str(folder) for folder in (self.home / "lib64", self.home / "lib") if folder.is_dir()]


def library_file(sources: Path = build.SOURCES) -> Path:
    """The shared library of the CUDA operators, compiled now for the GPUs of this machine if it has not been before.

    Raises:
        BuildError: there is no library yet and none can be built here.
    """
    check_platform()
    architectures = wanted_architectures()
    packaged = build.PACKAGED / library_name(sources_key(sources))
    if packaged.exists():
        return packaged
    toolkit, compiler = find_toolkit(), find_compiler()
    target = cache_folder() / library_name(sources_key(sources), machine_key(toolkit, compiler, architectures))
    if not target.exists():
        make.make(recipe(sources, toolkit, compiler, code_for(architectures)), target)
    return target


def build_for_package(folder: Path | str, sources: Path = build.SOURCES) -> Path:
    """Compile the library that an installation brings along, for every GPU from compute capability 8.0 on."""
    check_platform()
    target = Path(folder) / library_name(sources_key(sources))
    code = [*code_for(ARCHITECTURES), f"-gencode=arch=compute_{INTERMEDIATE},code=compute_{INTERMEDIATE}"]
    make.make_for_package(recipe(sources, find_toolkit(), find_compiler(), code), target)
    return target


def check_platform() -> None:
    """Raises a BuildError unless this is Linux and Paddle was compiled with CUDA."""
    if not paddle.is_compiled_with_cuda():
        raise BuildError("this Paddle was compiled without CUDA; install paddlepaddle-gpu")
    if not sys.platform.startswith("linux"):
        raise BuildError(f"they are written for Linux, and this is {sys.platform}")


def wanted_architectures() -> tuple[str, ...]:
    """What to compile for, such as ("80", "90a"): as $ERNIE45_CUDA_ARCH says, otherwise for the GPUs that are here.

    Raises:
        BuildError: there is no GPU here, or one that is too old.
    """
    if named := os.environ.get("ERNIE45_CUDA_ARCH"):
        return tuple(re.split(r"[;,\s]+", named.strip()))
    count = paddle.device.cuda.device_count()
    found = sorted({tuple(paddle.device.cuda.get_device_capability(index)) for index in range(count)})
    if not found:
        raise BuildError("no GPU is here to compile them for; name compute capabilities in $ERNIE45_CUDA_ARCH")
    if found[0] < OLDEST:
        raise BuildError(f"they need a GPU of compute capability 8.0, and one here has {found[0][0]}.{found[0][1]}")
    return tuple(architecture_of(*capability) for capability in found)


def architecture_of(major: int, minor: int) -> str:
    """How nvcc calls a compute capability; Hopper's own instructions need the "a"."""
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def code_for(architectures: tuple[str, ...]) -> list[str]:
    """The flags of nvcc for machine code of these architectures."""
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]


def find_toolkit() -> Toolkit:
    """The CUDA toolkit in $NVCC, $CUDA_HOME, the search path or /usr/local/cuda.

    Raises:
        BuildError: there is none, or its compiler does not start.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("NVCC"), *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for path in map(shutil.which, filter(None, candidates)) if path), None)
    if found is None:
        raise BuildError("no nvcc: install the CUDA toolkit, or name its folder in $CUDA_HOME")
    said = _run(found, "--version").stdout
    dry_run = _run(found, "--dryrun", "-x", "cu", os.devnull).stderr
    # What starts it may be a script or a link: nvcc itself knows where the rest of it is.
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    home = Path(top[1]).resolve() if top else Path(found).resolve().parent.parent
    release = re.search(r"^.*release.*$", said, re.MULTILINE)
    return Toolkit(home, Path(found), release[0] if release else said.strip())


def _run(nvcc: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run ({error}); name another CUDA toolkit in $CUDA_HOME") from None


def sources_key(sources: Path = build.SOURCES) -> str:
    """Names the sources, our flags, and the versions of Paddle and Python: what a packaged library has to agree in."""
    flags = [*KERNEL_FLAGS, *BINDING_FLAGS, *LINK_FLAGS, *ARCHITECTURES, INTERMEDIATE]
    files = [
        *_sources(sources / "cuda", "*.cu", "*.cuh", "*.h"),
        *_sources(sources / "cuda_bindings", "*.cpp", "*.h"),
        *_sources(sources / "bindings", "shapes.h"),
    ]
    return make.key_of([*build.runtime_versions(), *flags], sources, files)


def machine_key(toolkit: Toolkit, compiler: Compiler, architectures: tuple[str, ...]) -> str:
    """Names both compilers, what the user adds to their flags, the GPUs, and the Paddle that is linked."""
    flags = os.environ.get("CXXFLAGS", "")
    versions = [str(toolkit.nvcc), toolkit.version, *compiler.command, compiler.version]
    return make.hash_of([*versions, flags, *architectures, paddle.__file__])


def library_name(*keys: str) -> str:
    """The file name of the library with these keys."""
    return "-".join(["ernie45_cuda", *keys]) + ".so"


def recipe(sources: Path, toolkit: Toolkit, compiler: Compiler, code: list[str]) -> Recipe:
    """How these compilers make the library of these sources, with the machine code that `code` asks nvcc for."""
    libraries = [argument for folder in toolkit.libraries for argument in ("-L", folder)]
    return Recipe(
        what="CUDA operators",
        duration="1 min",
        sources=sources,
        units=(*kernel_units(sources, toolkit, compiler, code), binding_unit(sources, toolkit, compiler)),
        link=(*compiler.command, *LINK_FLAGS),
        libraries=(*paddle_libraries(), *libraries, *RUNTIME),
        key=make.hash_of([paddle.version.commit, toolkit.version, compiler.version]),
        facts={"compiler": f"{toolkit.version}; {compiler.version}"},
    )


def kernel_units(sources: Path, toolkit: Toolkit, compiler: Compiler, code: list[str]) -> list[Unit]:
    """The kernels, file by file."""
    command = (str(toolkit.nvcc), f"-ccbin={compiler.command[0]}", *KERNEL_FLAGS, *code, f"-I{sources / 'cuda'}")
    return [Unit(path.stem, (path,), command) for path in _sources(sources / "cuda", "*.cu")]


def binding_unit(sources: Path, toolkit: Toolkit, compiler: Compiler) -> Unit:
    """The operators, all at once: reading Paddle's headers takes nearly all of the time."""
    includes = [f"-isystem{folder}" for folder in (*include_folders(), *toolkit.includes)]
    added = shlex.split(os.environ.get("CXXFLAGS", ""))
    files = tuple(_sources(sources / "cuda_bindings", "*.cpp"))
    return Unit("cuda_bindings", files, (*compiler.command, *BINDING_FLAGS, f"-I{sources}", *includes, *added))


def _sources(folder: Path, *patterns: str) -> list[Path]:
    return [path for path in files_in(folder, *patterns) if not path.name.startswith(".")]
