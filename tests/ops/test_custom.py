"""Choosing between the fused operators and the reference; what cannot be undone runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import paddle
import pytest

from ernie45 import runtime
from ernie45.errors import ErnieError
from ernie45.ops import __main__ as report
from ernie45.ops import build, custom, toolchain

ROOT = Path(__file__).parents[2]
USE = """
import warnings
import paddle
from ernie45.ops import custom
x = paddle.ones([2, 4])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(custom.usable(x), custom.usable(x, x), custom.library())
for warning in caught:
    print(warning.category.__name__, warning.filename, warning.message)
"""


def run_python(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("ERNIE45_")} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture
def native() -> object:
    library = custom.library()
    if library is None:
        pytest.skip(custom.loaded().why_not)
    return library


def fake(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Pretend that a library with these functions is loaded."""
    monkeypatch.setattr(custom, "_loaded", custom.Loaded(types.SimpleNamespace(**functions), None, ()))


def test_without_a_compiler_there_is_one_warning_and_the_reference(tmp_path: Path) -> None:
    lines = run_python("-c", USE, CXX="/nonexistent", ERNIE45_CACHE=str(tmp_path)).splitlines()
    assert lines[0] == "False False None"
    assert len(lines) == 2
    assert lines[1].startswith("ReferencePathWarning <string> ernie45: no fused CPU operators: no C++ compiler: ")
    assert "install g++" in lines[1]


@pytest.mark.parametrize("setting", [{"ERNIE45_OPS": "reference"}, {"ERNIE45_BUILD": "0"}], ids=["ops", "build"])
def test_what_the_user_switched_off_is_no_warning(setting: dict[str, str], tmp_path: Path) -> None:
    assert run_python("-c", USE, ERNIE45_CACHE=str(tmp_path), **setting).splitlines() == ["False False None"]
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_loaded_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERNIE45_OPS", raising=False)
    monkeypatch.delenv("ERNIE45_BUILD", raising=False)
    monkeypatch.setattr(custom, "_loaded", None)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(build, "library_file", lambda: broken)
    with pytest.warns(custom.ReferencePathWarning, match="broken.so"):
        assert custom.library() is None
    assert custom.library() is None and "broken.so" in custom.loaded().why_not


def test_only_tensors_on_the_cpu_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    x = paddle.ones([2])
    for only_cpu in (True, False):
        monkeypatch.setattr(custom, "_only_cpu", only_cpu)
        assert custom.usable() and custom.usable(x) and custom.usable(x, paddle.zeros([0, 3]))
        assert not custom.usable(object()) and not custom.usable(x, None)

    class OnGPU:
        place = types.SimpleNamespace(is_cpu_place=lambda: False)

    monkeypatch.setattr(custom, "Tensor", OnGPU)
    assert not custom.usable(OnGPU())


def test_reference_only_can_be_nested_and_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    x = paddle.ones([2])
    with custom.reference_only():
        with custom.reference_only():
            assert not custom.usable(x)
        assert not custom.usable(x)
    assert custom.usable(x)
    with pytest.raises(KeyError), custom.reference_only():
        raise KeyError
    assert custom.usable(x)


def test_run_calls_a_registered_operator_and_gives_a_list(native: object) -> None:
    assert "ernie45_swiglu" in custom.loaded().operators
    result = custom.run("ernie45_swiglu", paddle.ones([3, 4]))
    assert isinstance(result, list) and [tensor.shape for tensor in result] == [[3, 2]]


@pytest.mark.parametrize("name", custom.INSTRUCTION_SETS)
def test_instruction_set_is_chosen_inside_only(name: str, native: object) -> None:
    before = native.ernie45_isa()
    if name not in toolchain.instruction_sets():
        with pytest.raises(ErnieError, match=f"lacks {name}"), custom.instruction_set(name):
            pass
        return
    with pytest.raises(KeyError), custom.instruction_set(name):
        assert native.ernie45_isa() == custom.INSTRUCTION_SETS[name]
        raise KeyError
    assert native.ernie45_isa() == before


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ErnieError, match="found 'sse2', expected one of avx2, avx512"), custom.instruction_set("sse2"):
        pass
    fake(monkeypatch, ernie45_isa=lambda: 1, ernie45_set_isa=lambda wanted: 0)
    monkeypatch.setattr(toolchain, "instruction_sets", lambda: ["avx2"])
    with pytest.raises(ErnieError, match="lacks avx512; it has avx2"), custom.instruction_set("avx512"):
        pass
    monkeypatch.setattr(custom, "_loaded", custom.Loaded(None, None, (), "no compiler"))
    with pytest.raises(ErnieError, match="avx2 needs the native library: no compiler"), custom.instruction_set("avx2"):
        pass


def test_the_library_follows_the_number_of_threads(native: object, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.ernie45_num_threads()
    assert before == runtime.num_threads()
    monkeypatch.setattr(runtime, "_threads", None)  # so that it is restored
    for count in (3, before):
        runtime.set_num_threads(count)
        assert native.ernie45_num_threads() == count


def test_the_report_names_every_operator_and_the_library(native: object, capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    table, facts, on_gpu = capsys.readouterr().out.split("\n\n", 2)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["operator", "implementation", "why"]
    assert {row[0] for row in rows[1:]} == {
        name.removeprefix("ernie45_") for name in custom.loaded().operators if not name.endswith("_grad")
    }
    assert {row[1] for row in rows[1:]} == {"native"} and {row[2] for row in rows[1:]} <= {"avx512", "avx2"}
    assert str(custom.loaded().file) in facts and f"threads:  {native.ernie45_num_threads()}" in facts
    assert on_gpu.startswith("on a GPU\n")


def test_the_report_names_the_same_operators_without_a_library(native: object) -> None:
    output = run_python("-m", "ernie45.ops", ERNIE45_OPS="reference")
    table, facts, _ = output.split("\n\n", 2)
    rows = [line.split() for line in table.splitlines()[1:]]
    assert sorted(row[0] for row in rows) == report.operators()
    assert {row[1] for row in rows} == {"reference"} and facts.strip() == "library:  none: ERNIE45_OPS=reference"
