"""Compiles ``csrc`` into the shared library of the CPU operators: once, at install or at first use.

A library that was built with the package is taken if it fits, then one from the cache folder, and otherwise the
compiler runs. Files are named by what they were made from, so that nothing stale is ever loaded.

Environment:
    ERNIE45_CACHE: the cache folder; otherwise ``$XDG_CACHE_HOME/ernie45`` or ``~/.cache/ernie45``.
    ERNIE45_BUILD: 0 compiles nothing; a library that is already there is still used.
    CXX, CXXFLAGS: the compiler (g++ unless given) and further flags for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import paddle

from ernie45.ops.toolchain import (
    BINDING_FLAGS,
    FLAGS,
    INSTRUCTION_SETS,
    KERNEL_FLAGS,
    LINK_FLAGS,
    BuildError,
    Compiler,
    check_platform,
    find_compiler,
    include_folders,
    instruction_sets,
    linker_arguments,
)

SOURCES = Path(__file__).with_name("csrc")
PACKAGED = Path(__file__).with_name("_native")

KEPT_OBJECTS_DAYS = 30


@dataclass(frozen=True)
class Unit:
    """One run of the compiler: the files that it reads, one after the other, and the flags of its own."""

    name: str
    files: tuple[Path, ...]
    flags: tuple[str, ...]


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
        if os.environ.get("ERNIE45_BUILD") == "0":
            raise BuildError("ERNIE45_BUILD=0 and no library has been built before")
        build(sources, target, compiler)
    return target


def build_for_package(folder: Path | str, sources: Path = SOURCES) -> Path:
    """Compile the library that an installation brings along; ``folder`` becomes ``ernie45/ops/_native``."""
    check_platform()
    target = Path(folder) / library_name(sources_key(sources))
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / target.name
        build(sources, built, find_compiler())
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in (built, facts_file(built)):
            shutil.copy(path, target.parent)
    return target


def read_facts(library: Path) -> dict[str, str | float]:
    """The ``compiler`` that built this library and the ``seconds`` that it took; empty if that is not known."""
    try:
        return json.loads(facts_file(library).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def cache_folder() -> Path:
    """Where compiled files are kept."""
    if named := os.environ.get("ERNIE45_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ernie45"


# Keys: what a file was made from


def sources_key(sources: Path = SOURCES) -> str:
    """Names the sources, our flags, and the versions of Paddle and Python: what a packaged library has to agree in."""
    parts = [
        paddle.version.full_version,
        paddle.version.commit,
        sys.implementation.cache_tag,
        *FLAGS,
        *KERNEL_FLAGS,
        *BINDING_FLAGS,
        *LINK_FLAGS,
        *(flag for flags in INSTRUCTION_SETS.values() for flag in flags),
    ]
    for path in _files(sources, "*.cpp", "*.h"):
        parts += [str(path.relative_to(sources)), path.read_text(encoding="utf-8")]
    return _hash(parts)


def machine_key(compiler: Compiler) -> str:
    """Names the compiler, what the user adds to its flags, the processor, and the Paddle that is linked."""
    flags = os.environ.get("CXXFLAGS", "")
    return _hash([*compiler.command, compiler.version, flags, *instruction_sets(), paddle.__file__])


def library_name(*keys: str) -> str:
    """The file name of the library with these keys."""
    return "-".join(["ernie45_cpu", *keys]) + ".so"


def facts_file(library: Path) -> Path:
    """The small file beside a library that says how it was built."""
    return library.with_suffix(".json")


def log_file(library: Path) -> Path:
    """The file beside a library that could not be built, with all that the compiler said."""
    return library.with_suffix(".log")


# Compile and link


def build(sources: Path, target: Path, compiler: Compiler) -> None:
    """Compile ``sources`` into ``target``; one process at a time, the others wait and find it done.

    Raises:
        BuildError: the folder cannot be written, or the compiler fails; its messages are in a log file beside
            ``target``, which the error names.
    """
    folder = target.parent
    try:
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder):
            if log_file(target).exists():
                raise BuildError(f"the compiler has failed before: see {log_file(target)}; remove it to try again")
            if not target.exists():
                _build(sources, target, compiler)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}; name a folder that can be written in $ERNIE45_CACHE") from error


def units(sources: Path) -> list[Unit]:
    """What to compile: bindings as one unit, kernels for each instruction set, the rest once.

    The bindings are one unit because reading Paddle's headers takes nearly all of their time.
    """
    found = []
    if bindings := _files(sources / "bindings", "*.cpp"):
        includes = [f"-isystem{folder}" for folder in include_folders()]
        found.append(Unit("bindings", tuple(bindings), (*BINDING_FLAGS, *includes)))
    for path in _files(sources / "cpu", "*.cpp"):
        if re.search(r"^namespace [\w:]*\bERNIE_ISA\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            for name, flags in INSTRUCTION_SETS.items():
                found.append(Unit(f"{path.stem}.{name}", (path,), (*KERNEL_FLAGS, *flags)))
        else:
            found.append(Unit(path.stem, (path,), tuple(KERNEL_FLAGS)))
    return found


def _build(sources: Path, target: Path, compiler: Compiler) -> None:
    started = time.monotonic()
    todo = units(sources)
    folder = target.parent
    objects = {unit: folder / "objects" / f"{unit.name}-{_object_key(unit, sources, compiler)}.o" for unit in todo}
    missing = [unit for unit, path in objects.items() if not path.exists()]
    _say(f"building CPU operators ({len(missing)} files, about 30 s, once) in {folder}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as temporary:

        def compile_unit(unit: Unit) -> str:
            flags = [*FLAGS, *unit.flags, f"-I{sources}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
            text = "".join(f'#include "{path}"\n' for path in unit.files)
            made = Path(temporary) / objects[unit].name
            return _run([*compiler.command, *flags, "-x", "c++", "-c", "-", "-o", str(made)], made, objects[unit], text)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            _stop_on_errors(list(pool.map(compile_unit, missing)), log_file(target))
        made = Path(temporary) / target.name
        command = [*compiler.command, *LINK_FLAGS, *map(str, objects.values()), *linker_arguments(), "-o", str(made)]
        _stop_on_errors([_run(command, made, made)], log_file(target))
        seconds = time.monotonic() - started
        facts = {"compiler": compiler.version, "seconds": round(seconds, 1)}
        facts_made = facts_file(made)
        facts_made.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(facts_made, facts_file(target))
        os.replace(made, target)
    _remove_unused(folder / "objects", set(objects.values()))
    _say(f"built {target.name} in {seconds:.0f} s")


def _run(command: list[str], made: Path, target: Path, text: str = "") -> str:
    """Run the compiler and move what it made to its place; returns its complaint if it failed."""
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        return f"{shlex.join(command)}\n{text}{result.stdout}{result.stderr}\n"
    os.replace(made, target)
    return ""


def _stop_on_errors(complaints: list[str], log: Path) -> None:
    text = "\n".join(filter(None, complaints))
    if not text:
        return
    log.write_text(text, encoding="utf-8")
    first = re.search(r"^.*\berror: .*$|^.*undefined reference.*$", text, re.MULTILINE)
    raise BuildError(f"the compiler failed{': ' + first[0] if first else ''}; all of its messages are in {log}")


def _object_key(unit: Unit, sources: Path, compiler: Compiler) -> str:
    parts = [*FLAGS, *unit.flags, str(sources), paddle.version.commit, machine_key(compiler)]
    return _hash([*parts, *(path.read_text(encoding="utf-8") for path in _with_headers(unit.files, sources))])


def _with_headers(files: tuple[Path, ...], sources: Path) -> list[Path]:
    """These files and every header of ours that they include, so that a change compiles only what it concerns."""
    found: list[Path] = []
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            waiting += [Path(os.path.normpath(folder / name)) for folder in (path.parent, sources)]
    return sorted(found)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    import fcntl  # not on every system that can use the reference

    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds CPU operators in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unused(folder: Path, used: set[Path]) -> None:
    """Objects save time when sources change; those that no build has used for a month will not."""
    for path in used:
        os.utime(path)
    oldest = time.time() - KEPT_OBJECTS_DAYS * 24 * 3600
    for path in folder.glob("*.o"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _say(line: str) -> None:
    print(f"ernie45: {line}", file=sys.stderr, flush=True)


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.rglob(pattern))


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
