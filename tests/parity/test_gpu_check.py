"""The tool that checks and times kernels on a GPU, without one: emulated kernels are checked, numbers made up."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tools import gpu_check  # noqa: E402
from tools.gpu.case import Case, Shape, Tensors  # noqa: E402
from tools.gpu.library import CudaError  # noqa: E402

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parent.parent.parent


def doubling(right: bool = True) -> Case:
    """A kernel that doubles, or claims to."""

    def make(generator: torch.Generator, shape: Shape) -> Tensors:
        return {"x": torch.rand(shape["rows"], generator=generator, device=generator.device)}

    def run(library: object, inputs: Tensors, shape: Shape) -> Tensors:
        return {"out": inputs["x"] * (2 if right else 2.1)}

    return Case(
        name="double",
        shapes={"21B": {"rows": 8, "dtype": "float32"}},
        edges=({"rows": 0}, {"rows": 3}),
        make=make,
        run=run,
        reference=lambda inputs, shape: {"out": inputs["x"].double() * 2},
        eager=lambda inputs, shape: {"out": inputs["x"] + inputs["x"]},
        bytes=lambda shape: 8 * shape["rows"],
    )


def test_the_emulated_kernels_are_checked_by_one_command() -> None:
    command = [sys.executable, "-W", "ignore", "tools/gpu_check.py", "--emulated", "--only", "swiglu with probability"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].endswith(" checks passed, 0 failed")
    assert not result.stdout.startswith("0 ")


@pytest.mark.parametrize("full", [False, True])
def test_edges_are_checked_and_the_shapes_of_models_where_there_is_room(full: bool) -> None:
    names = [name for name, problem in gpu_check.check([doubling()], None, "cpu", full) if problem is None]
    assert names == ["double {'rows': 0}", "double {'rows': 3}"] + ["double {'rows': 8, 'dtype': 'float32'}"] * full


def test_a_kernel_that_is_wrong_fails_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.report_problems(gpu_check.check([doubling(right=False)], None, "cpu", False)) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("WRONG double {'rows': 3}: out is ") and said[-1] == "1 checks passed, 1 failed"


def test_a_kernel_that_cannot_be_started_fails_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def run(library: object, inputs: Tensors, shape: Shape) -> Tensors:
        raise CudaError("ernie45_cuda_double", 1)

    case = dataclasses.replace(doubling(), run=run)
    assert gpu_check.report_problems(gpu_check.check([case], None, "cpu", False)) == 1
    assert "WRONG double {'rows': 3}: ernie45_cuda_double: cudaError_t 1" in capsys.readouterr().out


def test_kernels_are_chosen_by_name() -> None:
    everything = [case.name for case in gpu_check.chosen_cases("")]
    assert everything and len(set(everything)) == len(everything)
    assert [case.name for case in gpu_check.chosen_cases("swiglu")] == [name for name in everything if "swiglu" in name]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1 and "--emulated" in capsys.readouterr().err


def test_every_kernel_is_timed_beside_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def microseconds(function: Callable[[], Any]) -> float:
        timed.append(function())
        return 10.0 * len(timed)

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(gpu_check, "microseconds", microseconds)
    (row,) = gpu_check.measure([doubling()], None, "cpu")
    assert row == gpu_check.Row("double", "21B: 8 float32", 10.0, 64, 20.0, 30.0, None)
    assert all(torch.equal(out["out"], timed[0]["out"]) for out in timed)


def test_a_peer_that_does_not_run_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "microseconds", lambda function: function())

    def fails(inputs: Tensors, shape: Shape) -> Tensors:
        raise RuntimeError("no Triton here")

    assert gpu_check.time_peer(fails, {}, {}) is None and "no Triton here" in capsys.readouterr().err
    assert gpu_check.time_peer(None, {}, {}) is None


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "machine", lambda: "A GPU")
    rows = [
        gpu_check.Row("double", "21B: 8", 10.0, 36_000_000, 20.0, 25.0, None),
        gpu_check.Row("gate", "300B: 9", 5.0, 9_000_000, None, None, 7.0),
    ]
    assert gpu_check.markdown(rows, 4000.0).splitlines() == [
        "A GPU. A copy of 1 GiB moves 4000 GB/s.",
        "",
        "| kernel | shape | µs | GB/s | of copy | eager µs | compiled µs | Triton µs | faster than compiled |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| double | 21B: 8 | 10.0 | 3600 | 0.90 | 20.0 | 25.0 |  | 2.5x |",
        "| gate | 300B: 9 | 5.0 | 1800 | 0.45 |  |  | 7.0 |  |",
    ]


def test_the_table_takes_its_place_in_a_page(tmp_path: Path) -> None:
    page = tmp_path / "cuda.md"
    page.write_text(f"before\n{gpu_check.START}\nold\n{gpu_check.END}\nafter\n", encoding="utf-8")
    for text in ("new\n", "newer\n"):
        gpu_check.put_into(page, text)
        assert page.read_text(encoding="utf-8") == f"before\n{gpu_check.START}\n{text}{gpu_check.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        gpu_check.put_into(page, "new")
    assert gpu_check.START in (ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")


def test_the_sanitizer_is_skipped_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.sanitize(tmp_path, "") == 0 and "not installed" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 9])
def test_the_sanitizer_checks_the_edges_with_each_of_its_tools(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {tmp_path}/log\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(program))
    assert gpu_check.sanitize(tmp_path / "k.so", "swiglu") == (code != 0)
    calls = (tmp_path / "log").read_text().splitlines()
    assert [call.split()[0] for call in calls] == list(gpu_check.SANITIZERS)
    assert all("--edges --library" in call and call.split()[1] == "1" for call in calls)
    assert ("FAILED" in capsys.readouterr().out) == (code != 0)
