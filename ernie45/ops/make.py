"""Makes shared libraries out of sources: each object once, in the cache folder, one process at a time.

Files are named by what they were made from, so that nothing stale is ever loaded. What to make, and with which
compiler, is said by a `Recipe`: ``build`` has the one of the CPU operators, ``build_cuda`` that of the CUDA operators.

Environment:
    ERNIE45_CACHE: the cache folder; otherwise ``$XDG_CACHE_HOME/ernie45`` or ``~/.cache/ernie45``.
    ERNIE45_BUILD: 0 compiles nothing; a library that is already there is still used.
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

from ernie45.ops.toolchain import BuildError

KEPT_OBJECTS_DAYS = 30


@dataclass(frozen=True)
class Unit:
    """One run of a compiler.

    Attributes:
        name: of the object file.
        files: what it reads, one after the other.
        command: the compiler and its flags; the input and the output follow.
    """

    name: str
    files: tuple[Path, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """How a library is made.

    Attributes:
        what: what messages call it, such as "CPU operators".
        duration: about how long everything takes, such as "30 s".
        sources: the folder that includes in the sources start from.
        units: what is compiled.
        link: the command that links, without objects and output.
        libraries: the arguments that follow the objects.
        key: what objects depend on besides commands and sources: the versions of compilers, of Paddle.
        facts: what is kept beside the library, for `read_facts`.
    """

    what: str
    duration: str
    sources: Path
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    libraries: tuple[str, ...]
    key: str
    facts: dict[str, str]


def make(recipe: Recipe, target: Path) -> None:
    """Make ``target``; one process at a time, the others wait and find it done.

    Raises:
        BuildError: building is switched off, the folder cannot be written, or a compiler fails; its messages are in a
            log file beside ``target``, which the error names.
    """
    folder = target.parent
    if os.environ.get("ERNIE45_BUILD") == "0":
        raise BuildError("ERNIE45_BUILD=0 and no library has been built before")
    try:
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(recipe, folder):
            if log_file(target).exists():
                raise BuildError(f"the compiler has failed before: see {log_file(target)}; remove it to try again")
            if not target.exists():
                _make(recipe, target)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}; name a folder that can be written in $ERNIE45_CACHE") from error


def make_for_package(recipe: Recipe, target: Path) -> None:
    """Make ``target`` and leave nothing else beside it than its facts."""
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / target.name
        make(recipe, built)
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in (built, facts_file(built)):
            shutil.copy(path, target.parent)


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


def facts_file(library: Path) -> Path:
    """The small file beside a library that says how it was built."""
    return library.with_suffix(".json")


def log_file(library: Path) -> Path:
    """The file beside a library that could not be built, with all that the compiler said."""
    return library.with_suffix(".log")


def key_of(parts: list[str], sources: Path, files: list[Path]) -> str:
    """Names these parts and what is in the files of a folder."""
    texts = [text for path in files for text in (str(path.relative_to(sources)), path.read_text(encoding="utf-8"))]
    return hash_of([*parts, *texts])


def files_in(folder: Path, *patterns: str) -> list[Path]:
    """The files below a folder that fit one of the patterns, in an order that does not depend on the machine."""
    return sorted(path for pattern in patterns for path in folder.rglob(pattern))


def hash_of(parts: list[str]) -> str:
    """Sixteen digits that name these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _make(recipe: Recipe, target: Path) -> None:
    started = time.monotonic()
    folder = target.parent
    objects = {unit: folder / "objects" / f"{unit.name}-{_object_key(unit, recipe)}.o" for unit in recipe.units}
    missing = [unit for unit, path in objects.items() if not path.exists()]
    _say(f"building {recipe.what} ({len(missing)} files, about {recipe.duration}, once) in {folder}")
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as temporary:

        def compile_unit(unit: Unit) -> str:
            text = "".join(f'#include "{path}"\n' for path in unit.files)
            together = Path(temporary) / f"{unit.name}{unit.files[0].suffix}"
            together.write_text(text, encoding="utf-8")
            made = Path(temporary) / objects[unit].name
            return _run([*unit.command, "-c", str(together), "-o", str(made)], made, objects[unit], text)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            _stop_on_errors(list(pool.map(compile_unit, missing)), log_file(target))
        made = Path(temporary) / target.name
        command = [*recipe.link, *map(str, objects.values()), *recipe.libraries, "-o", str(made)]
        _stop_on_errors([_run(command, made, made)], log_file(target))
        seconds = time.monotonic() - started
        facts_made = facts_file(made)
        facts_made.write_text(json.dumps({**recipe.facts, "seconds": round(seconds, 1)}), encoding="utf-8")
        os.replace(facts_made, facts_file(target))
        os.replace(made, target)
    _remove_unused(folder / "objects", set(objects.values()))
    _say(f"built {target.name} in {seconds:.0f} s")


def _run(command: list[str], made: Path, target: Path, text: str = "") -> str:
    """Run a compiler and move what it made to its place; returns its complaint if it failed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return f"{shlex.join(command)}\n{text}{result.stdout}{result.stderr}\n"
    os.replace(made, target)
    return ""


def _stop_on_errors(complaints: list[str], log: Path) -> None:
    text = "\n".join(filter(None, complaints))
    if not text:
        return
    log.write_text(text, encoding="utf-8")
    first = re.search(r"^.*\berror: .*$|^.*undefined reference.*$|^.*\bfatal\b.*$", text, re.MULTILINE)
    raise BuildError(f"the compiler failed{': ' + first[0] if first else ''}; all of its messages are in {log}")


def _object_key(unit: Unit, recipe: Recipe) -> str:
    parts = [*unit.command, str(recipe.sources), recipe.key]
    return hash_of([*parts, *(path.read_text(encoding="utf-8") for path in _with_headers(unit.files, recipe.sources))])


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
def _one_at_a_time(recipe: Recipe, folder: Path) -> Iterator[None]:
    import fcntl  # not on every system that can use the reference

    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds operators in {folder}")
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
