"""Compiling the operators: on tiny sources, so that every build here takes about a second."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ernie45.ops import build, make, toolchain

HEADER = """#pragma once
inline int base() { return 40; }
"""
KERNEL = """#include "answer.h"
namespace ernie::ERNIE_ISA { int answer() { return base() + 1; } }
"""
ONCE = """// compiled once
#include "answer.h"
namespace ernie::avx2 { int answer(); }
namespace ernie::avx512 { int answer(); }
extern "C" __attribute__((visibility("default"))) 
int answer() { return ernie::avx2::answer() + ernie::avx512::answer(); }
"""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not toolchain.instruction_sets(), reason="nothing can be compiled here"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; no setting of the user's, and no library that was installed with the package."""
    for name in ("CXX", "CXXFLAGS", "ERNIE45_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ERNIE45_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "native")
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A kernel, a file that is compiled once, and a header."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "answer.h").write_text(HEADER)
    (folder / "cpu" / "kernel.cpp").write_text(KERNEL)
    (folder / "cpu" / "once.cpp").write_text(ONCE)
    return folder


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_kernels_are_compiled_for_both_instruction_sets_and_the_rest_once(sources: Path) -> None:
    units = build.units(sources, toolchain.Compiler(("c++", "-pipe"), "c++ 12"))
    assert all(unit.command[:2] == ("c++", "-pipe") for unit in units)
    found = {unit.name: unit.command for unit in units}
    assert list(found) == ["kernel.avx512", "kernel.avx2", "once"]
    assert "-mavx512bf16" in found["kernel.avx512"]
    assert not any("avx512" in flag for flag in (*found["kernel.avx2"], *found["once"]))


@needs_compiler
def test_it_is_built_once_and_only_what_changed_is_compiled_again(
    sources: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build.library_file(sources)
    assert answer(first) == 82
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("(")[0] for line in said[:1]] == ["ernie45: building CPU operators "]
    assert re.fullmatch(r"ernie45: built ernie45_cpu-\w+-\w+\.so in \d+ s", said[1]) and len(said) == 2
    facts = make.read_facts(first)
    assert facts["compiler"] == toolchain.find_compiler().version and 0 < facts["seconds"] < 120

    assert build.library_file(sources) == first
    assert capsys.readouterr().err == ""

    before = {path.name for path in (cache / "objects").iterdir()}
    edit(sources / "cpu" / "kernel.cpp", "+ 1", "+ 2")
    second = build.library_file(sources)
    new = {path.name.split("-")[0] for path in (cache / "objects").iterdir() if path.name not in before}
    assert new == {"kernel.avx512", "kernel.avx2"}
    assert second != first and answer(second) == 84

    edit(sources / "cpu" / "answer.h", "40", "50")
    assert answer(build.library_file(sources)) == 104


@needs_compiler
def test_only_paddles_openmp_runtime_is_linked(sources: Path, cache: Path) -> None:
    edit(
        sources / "cpu" / "once.cpp",
        'extern "C"',
        'int total;\nvoid add() {\n#pragma omp parallel\n  {\n#pragma omp atomic\n  ++total; } }\nextern "C"',
    )
    if shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")
    command = ["readelf", "--dynamic", str(build.library_file(sources))]
    needed = re.findall(r"NEEDED.*\[(.*)\]", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "libiomp5.so" in needed and not any("gomp" in name for name in needed)


@pytest.mark.parametrize("path", ["cpu/kernel.cpp", "cpu/answer.h"])
def test_the_key_changes_with_every_source(path: str, sources: Path) -> None:
    before = build.sources_key(sources)
    (sources / path).write_text((sources / path).read_text() + "\n")
    assert build.sources_key(sources) != before


def test_the_keys_change_with_flags_compiler_paddle_and_processor(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = toolchain.Compiler(("g++",), "g++ 12")

    def keys() -> tuple[str, str]:
        return build.sources_key(sources), build.machine_key(compiler)

    before = keys()
    assert build.machine_key(toolchain.Compiler(("g++",), "g++ 13")) != before[1]
    with monkeypatch.context() as patch:
        patch.setattr(build, "KERNEL_FLAGS", ["-O2"])
        assert keys()[0] != before[0]
    with monkeypatch.context() as patch:
        patch.setattr(build.paddle.version, "commit", "another")
        assert keys()[0] != before[0]
    with monkeypatch.context() as patch:
        patch.setenv("CXXFLAGS", "-g")
        assert keys()[0] == before[0] and keys()[1] != before[1]
    with monkeypatch.context() as patch:
        patch.setattr(build, "instruction_sets", lambda: ["another"])
        assert keys()[1] != before[1]
    assert keys() == before


@needs_compiler
def test_what_the_compiler_says_about_broken_sources_is_kept(sources: Path, cache: Path) -> None:
    edit(sources / "cpu" / "kernel.cpp", "base()", "nowhere()")
    with pytest.raises(
        toolchain.BuildError, match=r"kernel\.cpp:2:\d+: error: .*nowhere.*; all of its messages are in"
    ) as found:
        build.library_file(sources)
    log = Path(str(found.value).rpartition(" ")[2])
    text = log.read_text()
    assert log.parent == cache and "-mavx512bf16" in text and text.count("nowhere") >= 2
    assert not list(cache.glob("*.so")) and not list(cache.glob("building-*"))

    stamp = log.stat().st_mtime_ns
    with pytest.raises(toolchain.BuildError, match=re.escape(f"has failed before: see {log}; remove it to try again")):
        build.library_file(sources)
    assert log.stat().st_mtime_ns == stamp

    edit(sources / "cpu" / "kernel.cpp", "nowhere()", "base()")
    assert answer(build.library_file(sources)) == 82


@needs_compiler
def test_two_processes_at_once_build_once(sources: Path, cache: Path) -> None:
    script = (
        "import ctypes, sys; from pathlib import Path; from ernie45.ops import build; "
        "build.PACKAGED = Path('/nonexistent'); sys.stdin.read(1); "
        "print(ctypes.CDLL(str(build.library_file(Path(sys.argv[1])))).answer())"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(sources)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    root = str(Path(__file__).parents[2])
    both = [subprocess.Popen(command, text=True, cwd=root, **pipes) for _ in range(2)]
    for process in both:
        process.stdin.write("x")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in both]
    assert [output.strip() for output, _ in results] == ["82", "82"]
    assert sum(errors.count("built ernie45_cpu") for _, errors in results) == 1


@needs_compiler
def test_a_library_that_was_installed_with_the_package_needs_no_compiler(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = build.build_for_package(build.PACKAGED, sources)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build.library_file(sources) == packaged and answer(packaged) == 82
    assert "compiler" in make.read_facts(packaged)
    edit(sources / "cpu" / "answer.h", "40", "50")
    with pytest.raises(
        toolchain.BuildError, match="no C\\+\\+ compiler: '/nonexistent/c\\+\\+' does not run.*apt install"
    ):
        build.library_file(sources)


@needs_compiler
def test_building_can_be_switched_off(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE45_BUILD", "0")
    with pytest.raises(toolchain.BuildError, match="ERNIE45_BUILD=0"):
        build.library_file(sources)
    assert not cache.exists()
    monkeypatch.delenv("ERNIE45_BUILD")
    built = build.library_file(sources)
    monkeypatch.setenv("ERNIE45_BUILD", "0")
    assert build.library_file(sources) == built


@needs_compiler
def test_a_folder_that_cannot_be_written(sources: Path, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    with pytest.raises(toolchain.BuildError, match=r"cache: .*; name a folder that can be written in \$ERNIE45_CACHE"):
        build.library_file(sources)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("platform.machine", lambda: "aarch64", "Linux on x86-64, and this is linux on aarch64"),
        ("instruction_sets", list, "a processor with AVX2, FMA and F16C"),
        ("find_in_paddle", lambda name: None, "comes without libiomp5.so"),
    ],
)
def test_machines_that_cannot_run_it(
    name: str, value: object, message: str, sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    for needed, fine in (("instruction_sets", lambda: ["avx2"]), ("platform.machine", lambda: "x86_64")):
        monkeypatch.setattr(f"ernie45.ops.toolchain.{needed}", fine)
    monkeypatch.setattr(f"ernie45.ops.toolchain.{name}", value)
    with pytest.raises(toolchain.BuildError, match=message):
        build.library_file(sources)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma f16c avx2 avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_vnni", ["avx512", "avx2"]),
        ("fma f16c avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni", ["avx2"]),
        ("sse2 avx", []),
    ],
)
def test_instruction_sets(flags: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_read", lambda path: f"processor\t: 0\nflags\t\t: {flags}\n")
    assert toolchain.instruction_sets() == expected


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ERNIE45_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert build.cache_folder() == Path("/home/someone/.cache/ernie45")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert build.cache_folder() == Path("/caches/ernie45")
    monkeypatch.setenv("ERNIE45_CACHE", "here")
    assert build.cache_folder() == Path(os.getcwd()) / "here"
