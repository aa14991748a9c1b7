"""Compiling the CUDA operators: on tiny sources, and with a g++ that pretends to be nvcc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import paddle
import pytest

from ernie45.ops import build, build_cuda, make, toolchain

KERNEL = """#include "answer.h"
int kernel() { return base() + 1; }
"""
BINDING = """#include "../cuda/answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return kernel(); }
"""
HEADER = """inline int base() { return 40; }
int kernel();
"""
# Writes down what it is asked for, and compiles C++.
NVCC = """#!/bin/sh
echo "$*" >> {log}
case "$1" in
--version) printf 'nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release {version}, V1\\n'; exit ;;
--dryrun) echo '#$ TOP={home}/bin/..' >&2; exit ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
  -c) file=$2; shift ;;
  -o) out=$2; shift ;;
  -I*) include="$include $1" ;;
  esac
  shift
done
exec g++ -fPIC -x c++ $include -c "$file" -o "$out"
"""

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ar") is None, reason="nothing can be compiled here"
)


class Gpus:
    """The GPUs that Paddle says are here."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities

    def device_count(self) -> int:
        return len(self.capabilities)

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capabilities[index]


def toolkit(folder: Path, version: str = "13.0") -> Path:
    """A folder that looks like a CUDA toolkit; bin/log has one line for each call of its compiler."""
    for name in ("bin", "include/cccl", "lib64"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(log=folder / "bin" / "log", version=version, home=folder))
    nvcc.chmod(0o755)
    subprocess.run(["ar", "rcs", str(folder / "lib64" / "libcudart_static.a")], check=True)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit, a Paddle that was compiled with CUDA, one Hopper GPU, an empty cache and no settings of the user's."""
    for name in ("CXX", "CXXFLAGS", "ERNIE45_BUILD", "ERNIE45_CUDA_ARCH", "NVCC", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ERNIE45_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "native")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device, "cuda", Gpus((9, 0)))
    found = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(found))
    return found


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    for name, text in {"cuda/k.cu": KERNEL, "cuda/answer.h": HEADER, "cuda_bindings/b.cpp": BINDING}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "cuda" / ".draft.cu").write_text("not C++ at all")
    return folder


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def calls(home: Path) -> list[str]:
    return [line for line in (home / "bin" / "log").read_text().splitlines() if "-gencode" in line]


def test_kernels_are_built_once_for_the_gpus_that_are_here(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = build_cuda.library_file(sources)
    assert answer(library) == 41
    assert [line.count("-gencode") for line in calls(home)] == [1]
    assert "-gencode=arch=compute_90a,code=sm_90a" in calls(home)[0]
    assert "building CUDA operators (2 files, about 1 min, once)" in capsys.readouterr().err
    assert "release 13.0" in str(make.read_facts(library)["compiler"])

    assert build_cuda.library_file(sources) == library and len(calls(home)) == 1
    monkeypatch.setattr(paddle.device, "cuda", Gpus((9, 0), (8, 6), (9, 0)))
    assert build_cuda.library_file(sources) != library
    assert "code=sm_86" in calls(home)[1] and "code=sm_90a" in calls(home)[1] and len(calls(home)) == 2

    (sources / "cuda" / "answer.h").write_text(HEADER.replace("40", "50"))
    assert answer(build_cuda.library_file(sources)) == 51


def test_architectures_can_be_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE45_CUDA_ARCH", "80; 90a")
    assert build_cuda.wanted_architectures() == ("80", "90a")
    monkeypatch.setenv("ERNIE45_CUDA_ARCH", "120")
    assert build_cuda.wanted_architectures() == ("120",)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [(Gpus(), r"no GPU is here to compile them for.*\$ERNIE45_CUDA_ARCH"), (Gpus((7, 5)), "8.0, and one here has 7.5")],
)
def test_gpus_that_cannot_run_them(gpus: Gpus, message: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.device, "cuda", gpus)
    with pytest.raises(toolchain.BuildError, match=message):
        build_cuda.wanted_architectures()


def test_a_paddle_without_cuda_builds_nothing(home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    with pytest.raises(toolchain.BuildError, match="compiled without CUDA; install paddlepaddle-gpu"):
        build_cuda.library_file(sources)
    with pytest.raises(toolchain.BuildError, match="compiled without CUDA"):
        build_cuda.build_for_package(build.PACKAGED, sources)
    assert not (home / "bin" / "log").exists()


def test_without_a_toolkit_the_error_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda path: None)
    with pytest.raises(toolchain.BuildError, match=r"no nvcc: install the CUDA toolkit.*\$CUDA_HOME"):
        build_cuda.find_toolkit()


def test_a_compiler_that_does_not_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(toolchain.BuildError, match=r"bin/nvcc does not run .*\$CUDA_HOME"):
        build_cuda.find_toolkit()


def test_nvcc_itself_says_where_its_toolkit_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "elsewhere"
    link.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    link.chmod(0o755)
    monkeypatch.setenv("NVCC", str(link))
    monkeypatch.delenv("CUDA_HOME")
    found = build_cuda.find_toolkit()
    assert found.nvcc == link and found.home == home
    assert found.includes == [str(home / "include"), str(home / "include" / "cccl")]
    assert found.libraries == [str(home / "lib64")] and "release 13.0" in found.version


def test_the_library_of_a_package_runs_on_every_gpu_and_needs_no_compiler_later(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = build_cuda.build_for_package(build.PACKAGED, sources)
    assert {path.suffix for path in build.PACKAGED.iterdir()} == {".so", ".json"}
    wanted = ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_90,code=compute_90"]
    assert all(f"-gencode=arch={code}" in calls(home)[0] for code in wanted)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert build_cuda.library_file(sources) == packaged and answer(packaged) == 41


def test_what_nvcc_says_about_broken_sources_is_kept(home: Path, sources: Path) -> None:
    (sources / "cuda" / "k.cu").write_text(KERNEL.replace("base()", "nowhere()"))
    with pytest.raises(toolchain.BuildError, match=r"k\.cu:2:\d+: error: .*nowhere.*; all of its messages are in") as e:
        build_cuda.library_file(sources)
    assert "-gencode" in Path(str(e.value).rpartition(" ")[2]).read_text()


def test_building_can_be_switched_off(home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE45_BUILD", "0")
    with pytest.raises(toolchain.BuildError, match="ERNIE45_BUILD=0"):
        build_cuda.library_file(sources)


@pytest.mark.parametrize("path", ["cuda/k.cu", "cuda/answer.h", "cuda_bindings/b.cpp"])
def test_keys_change_with_what_is_compiled(path: str, home: Path, sources: Path) -> None:
    before, of_cpu = build_cuda.sources_key(sources), build.sources_key(sources)
    (sources / path).write_text((sources / path).read_text() + "\n")
    assert build_cuda.sources_key(sources) != before
    assert build.sources_key(sources) == of_cpu, "the CPU operators do not depend on it"


def test_keys_change_with_compilers_and_architectures(home: Path, tmp_path: Path) -> None:
    found, compiler = build_cuda.find_toolkit(), toolchain.Compiler(("g++",), "g++ 12")
    key = build_cuda.machine_key(found, compiler, ("80",))
    newer = build_cuda.Toolkit(found.home, found.nvcc, "release 14")
    others = [(newer, compiler, ("80",)), (found, toolchain.Compiler(("g++",), "g++ 13"), ("80",))]
    others += [(found, compiler, ("90a",))]
    assert key not in {build_cuda.machine_key(*other) for other in others}
