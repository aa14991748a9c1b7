"""Compiles the CPU operators in ``csrc`` into a shared library: once, at install or at first use.

A library that was built with the package is taken if it fits, then one from the cache folder, and otherwise the
compiler runs.

Environment, beside that of ``make``:
    CXX, CXXFLAGS: the compiler (g++ unless given) and further flags for it.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import paddle

from ernie45.ops import make
from ernie45.ops.make import Recipe, Unit, cache_folder, files_in
from ernie45.ops.toolchain import (
    BINDING_FLAGS,
    FLAGS,
    INSTRUCTION_SETS,
    KERNEL_FLAGS,
    LINK_FLAGS,
    Compiler,
    check_platform,
    find_compiler,
    include_folders,
    instruction_sets,
    linker_arguments,
)

SOURCES = Path(__file__).with_name("csrc")
PACKAGED = Path(__file__).with_name("_native")
FOLDERS = ("bindings", "cpu")  # of the sources: the others are for GPUs


def library_file(sources: Path = SOURCES) -> Path:
    """The shared library of these sources, compiled now if it has not been before.

    Raises:
        BuildError: there is no library yet and none can be built here.
    """
    packaged = PACKAGED / library_name(sources_key(sources))
    if packaged.exists():
        return packaged
    check_platform()
    compiler = find_compiler()
    target = cache_folder() / library_name(sources_key(sources), machine_key(compiler))
    if not target.exists():
        make.make(recipe(sources, compiler), target)
    return target


def build_for_package(folder: Path | str, sources: Path = SOURCES) -> Path:
    """Compile the library that an installation brings along; ``folder`` becomes ``ernie45/ops/_native``."""
    check_platform()
    target = Path(folder) / library_name(sources_key(sources))
    make.make_for_package(recipe(sources, find_compiler()), target)
    return target


def sources_key(sources: Path = SOURCES) -> str:
    """Names the sources, our flags, and the versions of Paddle and Python: what a packaged library has to agree in."""
    flags = [
        *FLAGS,
        *KERNEL_FLAGS,
        *BINDING_FLAGS,
        *LINK_FLAGS,
        *(flag for flags in INSTRUCTION_SETS.values() for flag in flags),
    ]
    files = [path for folder in FOLDERS for path in files_in(sources / folder, "*.cpp", "*.h")]
    return make.key_of([*runtime_versions(), *flags], sources, files)


def machine_key(compiler: Compiler) -> str:
    """Names the compiler, what the user adds to its flags, the processor, and the Paddle that is linked."""
    flags = os.environ.get("CXXFLAGS", "")
    return make.hash_of([*compiler.command, compiler.version, flags, *instruction_sets(), paddle.__file__])


def runtime_versions() -> list[str]:
    """The versions of Paddle and Python, on which every operator depends."""
    return [paddle.version.full_version, paddle.version.commit, str(sys.implementation.cache_tag)]


def library_name(*keys: str) -> str:
    """The file name of the library with these keys."""
    return "-".join(["ernie45_cpu", *keys]) + ".so"


def recipe(sources: Path, compiler: Compiler) -> Recipe:
    """How this compiler makes the library of these sources."""
    return Recipe(
        what="CPU operators",
        duration="30 s",
        sources=sources,
        units=tuple(units(sources, compiler)),
        link=(*compiler.command, *LINK_FLAGS),
        libraries=tuple(linker_arguments()),
        key=make.hash_of([paddle.version.commit, machine_key(compiler)]),
        facts={"compiler": compiler.version},
    )


def units(sources: Path, compiler: Compiler) -> list[Unit]:
    """What to compile: bindings as one unit, kernels for each instruction set, the rest once.

    The bindings are one unit because reading Paddle's headers takes nearly all of their time.
    """

    def unit(name: str, files: list[Path], *flags: str) -> Unit:
        added = shlex.split(os.environ.get("CXXFLAGS", ""))
        return Unit(name, tuple(files), (*compiler.command, *FLAGS, *flags, f"-I{sources}", *added))

    found = []
    if bindings := files_in(sources / "bindings", "*.cpp"):
        includes = [f"-isystem{folder}" for folder in include_folders()]
        found.append(unit("bindings", bindings, *BINDING_FLAGS, *includes))
    for path in files_in(sources / "cpu", "*.cpp"):
        if re.search(r"^namespace [\w:]*\bERNIE_ISA\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            for name, flags in INSTRUCTION_SETS.items():
                found.append(unit(f"{path.stem}.{name}", [path], *KERNEL_FLAGS, *flags))
        else:
            found.append(unit(path.stem, [path], *KERNEL_FLAGS))
    return found
