"""Compiles the CUDA operators for Ampere and Hopper, on a machine without a GPU, and shows what each kernel takes.

    python tools/check_cuda.py

Prints the registers, the spills and the static shared memory of every kernel. Fails if anything does not compile, if
the operators miss something at the link, or if a kernel spills: all of ours are bound by memory, and a register that is
spilled is more traffic. Needs the CUDA toolkit, g++ and Paddle, of which the CPU wheel will do.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ernie45.ops import build, build_cuda, toolchain
from ernie45.ops.make import Unit

ARCHITECTURES = ("80", "90a")
# What only a Paddle compiled with CUDA has.
MISSING_ON_CPU = "paddle::Tensor::stream() const"


class CheckError(Exception):
    """Something does not compile or link. The message is what the compiler said."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture: registers of a thread, bytes that it spills, shared bytes."""

    file: str
    kernel: str
    architecture: str
    registers: int
    spilled: int
    shared: int


def main() -> int:
    """Compile, print the table and the problems; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at once")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        usages = check(options.jobs)
    except (CheckError, toolchain.BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(usages)))
    spilling = [usage for usage in usages if usage.spilled]
    for usage in spilling:
        print(f"{usage.file}: {usage.kernel} spills {usage.spilled} bytes on sm_{usage.architecture}", file=sys.stderr)
    print(f"\n{len({(u.file, u.kernel) for u in usages})} kernels in {time.monotonic() - started:.0f} s")
    return 1 if spilling else 0


def check(jobs: int) -> list[Usage]:
    """Compile and link everything; what each kernel takes.

    Raises:
        CheckError: something does not compile, or is missing at the link.
        BuildError: there is no CUDA toolkit, or no C++ compiler.
    """
    toolkit, compiler = build_cuda.find_toolkit(), toolchain.find_compiler()
    recipe = build_cuda.recipe(build.SOURCES, toolkit, compiler, [*build_cuda.code_for(ARCHITECTURES), "-Xptxas=-v"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        objects = [f"{folder}/{unit.name}.o" for unit in recipe.units]
        said = list(pool.map(_compile, recipe.units, objects))
        resolving = ["-Wl,--no-undefined,--warn-unresolved-symbols"]
        command = [*recipe.link, *objects, *recipe.libraries, *resolving, "-o", f"{folder}/operators.so"]
        if missing := unresolved(_run(command)) - {MISSING_ON_CPU}:
            raise CheckError(f"operators call what neither kernels nor Paddle have: {', '.join(sorted(missing))}")
    return [
        usage for unit, text in zip(recipe.units, said, strict=True) for usage in usages_in(unit.files[0].name, text)
    ]


def usages_in(file: str, text: str) -> list[Usage]:
    """What ptxas said about the kernels of a file."""
    found = []
    blocks = re.split(r"^ptxas info\s*: Compiling entry function ", text, flags=re.MULTILINE)[1:]
    for block in blocks:
        name, architecture = re.match(r"'(\w+)' for 'sm_(\w+)'", block).groups()  # type: ignore[union-attr]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if spills is None or used is None:
            raise CheckError(f"{file}: no numbers in what ptxas says about {name}:\n{block}")
        spilled = int(spills[1]) + int(spills[2])
        found.append(Usage(file, name, architecture, int(used[1]), spilled, int(shared[1]) if shared else 0))
    return found


def unresolved(text: str) -> set[str]:
    """The names that a linker warns about."""
    return set(re.findall(r"undefined reference to [`']([^']+)'", text))


def table(usages: list[Usage]) -> list[str]:
    """One line for each kernel: for each architecture its registers, spilled and shared bytes."""
    cells = {(usage.file, usage.kernel, usage.architecture): usage for usage in usages}
    names = dict(zip((usage.kernel for usage in usages), readable(usage.kernel for usage in usages), strict=True))
    head = [f"sm_{name}: registers  spilled  shared" for name in ARCHITECTURES]
    width = max(len(f"{usage.file}: {names[usage.kernel]}") for usage in usages)
    lines = [f"{'kernel':{width}}  " + "  ".join(head)]
    for file, kernel in dict.fromkeys((usage.file, usage.kernel) for usage in usages):
        columns = []
        for name, title in zip(ARCHITECTURES, head, strict=True):
            usage = cells.get((file, kernel, name))
            numbers = f"{usage.registers:9}  {usage.spilled:7}  {usage.shared:6}" if usage else "-"
            columns.append(f"{numbers:>{len(title)}}")
        lines.append(f"{file + ': ' + names[kernel]:{width}}  " + "  ".join(columns))
    return lines


def readable(names: Iterable[str]) -> list[str]:
    """C++ names without their parameters and our namespaces; as they are where there is no c++filt."""
    names = list(names)
    try:
        found = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return names
    return [_shortened(line) for line in found.splitlines()]


def _shortened(name: str) -> str:
    """void ernie::cuda::(anonymous namespace)::add<float, (int)4>(float*) is add<float, 4>."""
    name = re.sub(r"\((?:int|bool|unsigned int|long)\)", "", name.replace("(anonymous namespace)::", ""))
    name = re.sub(r"\(.*", "", name.replace("ernie::cuda::", "").removeprefix("void "))
    return name.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")


def _compile(unit: Unit, target: str) -> str:
    """Compile a unit and give what the compiler said."""
    text = "".join(f'#include "{path}"\n' for path in unit.files)
    together = Path(target).with_suffix(unit.files[0].suffix)
    together.write_text(text, encoding="utf-8")
    return _run([*unit.command, "-c", str(together), "-o", target])


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CheckError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


if __name__ == "__main__":
    sys.exit(main())
