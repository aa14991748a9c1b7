"""The tool that compiles the CUDA operators: what it reads out of the compilers' messages, and when it fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ernie45.ops import build_cuda, make, toolchain

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tools")]

import check_cuda  # noqa: E402

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5ernie4cuda12_GLOBAL__N_13addIfLi4EEEvPfm' for 'sm_80'
ptxas info    : Function properties for _ZN5ernie4cuda12_GLOBAL__N_13addIfLi4EEEvPfm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 3.1 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5ernie4cuda12_GLOBAL__N_13addIfLi4EEEvPfm' for 'sm_90a'
ptxas info    : Function properties for _ZN5ernie4cuda12_GLOBAL__N_13addIfLi4EEEvPfm
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 8 bytes cumulative stack size
"""


def test_numbers_are_read_out_of_what_ptxas_says() -> None:
    first, second = check_cuda.usages_in("add.cu", SAID)
    assert (first.architecture, first.registers, first.spilled, first.shared) == ("80", 32, 0, 4096)
    assert (second.architecture, second.registers, second.spilled, second.shared) == ("90a", 40, 32, 0)
    assert first.kernel == second.kernel and check_cuda.usages_in("empty.cu", "") == []


def test_numbers_that_are_missing_are_an_error() -> None:
    with pytest.raises(check_cuda.CheckError, match=r"add\.cu: no numbers in what ptxas says about _ZN5ernie"):
        check_cuda.usages_in("add.cu", SAID.replace("Used 40 registers", ""))


def test_the_table_has_a_line_for_each_kernel_and_columns_for_each_architecture() -> None:
    lines = check_cuda.table(check_cuda.usages_in("add.cu", SAID))
    assert "sm_80: registers" in lines[0] and "sm_90a: registers" in lines[0] and len(lines) == 2
    assert lines[1].startswith("add.cu: ") and lines[1].split()[-6:] == ["32", "0", "4096", "40", "32", "0"]
    assert len(lines[1]) == len(lines[0])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void ernie::cuda::(anonymous namespace)::add<float, 4>(float*, unsigned long)", "add<float, 4>"),
        ("void ernie::cuda::(anonymous namespace)::gate<(int)8, (bool)1>(float const*)", "gate<8, 1>"),
        ("void ernie::cuda::(anonymous namespace)::norm<__nv_bfloat16, __half>()", "norm<bfloat16, float16>"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert check_cuda._shortened(name) == short


def test_what_a_linker_misses() -> None:
    text = "ld: warning: undefined reference to `paddle::Tensor::stream() const'\nx: undefined reference to `gone'\n"
    assert check_cuda.unresolved(text) == {check_cuda.MISSING_ON_CPU, "gone"}
    assert check_cuda.unresolved("") == set()


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Compilers that only speak: what is said about a unit of this name, and at the link."""
    said = {"add": SAID, "cuda_bindings": "", "link": f"undefined reference to `{check_cuda.MISSING_ON_CPU}'"}
    units = (make.Unit("add", (Path("add.cu"),), ("nvcc",)), make.Unit("cuda_bindings", (Path("b.cpp"),), ("g++",)))
    recipe = make.Recipe("CUDA operators", "1 s", ROOT, units, ("ld",), ("-lpaddle",), "", {})
    monkeypatch.setattr(build_cuda, "find_toolkit", lambda: None)
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    monkeypatch.setattr(build_cuda, "recipe", lambda *arguments: recipe)
    monkeypatch.setattr(check_cuda, "_compile", lambda unit, target: said[unit.name])
    monkeypatch.setattr(check_cuda, "_run", lambda command: said["link"])
    monkeypatch.setattr(sys, "argv", ["check_cuda.py", "--jobs", "1"])
    return said


def test_it_fails_for_a_kernel_that_spills(compilers: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert check_cuda.main() == 1
    output = capsys.readouterr()
    assert "spills 32 bytes on sm_90a" in output.err and "sm_80" not in output.err and "1 kernels in" in output.out


def test_it_passes_where_nothing_spills(compilers: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    compilers["add"] = SAID.replace("12 bytes spill", "0 bytes spill").replace("20 bytes spill", "0 bytes spill")
    assert check_cuda.main() == 0 and capsys.readouterr().err == ""


def test_it_fails_for_an_operator_that_calls_what_is_not_there(
    compilers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    compilers["link"] += "\nundefined reference to `ernie45_cuda_gone'"
    assert check_cuda.main() == 1
    assert "neither kernels nor Paddle have: ernie45_cuda_gone" in capsys.readouterr().err


def test_without_a_toolkit_it_says_what_to_do(
    compilers: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise toolchain.BuildError("no nvcc: install the CUDA toolkit")

    monkeypatch.setattr(build_cuda, "find_toolkit", missing)
    assert check_cuda.main() == 1 and "install the CUDA toolkit" in capsys.readouterr().err
