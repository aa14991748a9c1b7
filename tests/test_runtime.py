"""Threads and MKL's switch, in processes of their own: both are settings of a whole process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ernie45 import runtime

PREPARE = """
import os
import platform
import paddle
from ernie45 import runtime
chosen = []
runtime.set_num_threads = chosen.append
runtime.prepare_cpu()
runtime.prepare_cpu()
print(chosen, os.environ.get("MKL_DEBUG_CPU_TYPE"))
"""


def prepared(**environment: str) -> str:
    base = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    command = [sys.executable, "-c", PREPARE]
    result = subprocess.run(command, env=base | environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_all_physical_cores_once_and_the_users_choice_wins() -> None:
    assert prepared().startswith(f"[{runtime.physical_cores()}]")
    for threads in ("1", "3"):
        found = prepared(OMP_NUM_THREADS=threads, MKL_DEBUG_CPU_TYPE="4")
        assert found == "[] 4"


CPU = """processor : 0
vendor_id : {vendor}
physical id : {package}
core id : {core}
"""


def machine(monkeypatch: pytest.MonkeyPatch, places: list[tuple[int, int]], allowed: int, vendor: str = "x") -> None:
    """A machine whose hardware threads sit at these (package, core)."""
    text = "\n".join(CPU.format(vendor=vendor, package=package, core=core) for package, core in places)
    monkeypatch.setattr(runtime, "_read", lambda path: text if path == "/proc/cpuinfo" else "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)


@pytest.mark.parametrize(
    ("places", "allowed", "cores"),
    [
        ([(0, 0), (0, 1)], 2, 2),
        ([(0, 0), (0, 1), (0, 0), (0, 1)], 4, 2),
        ([(0, 0), (0, 1), (1, 0), (1, 1)], 4, 4),
        ([(0, 0), (0, 1), (0, 2), (0, 3)], 1, 1),
        ([], 3, 3),
    ],
    ids=["plain", "two threads a core", "two sockets", "restricted", "unknown"],
)
def test_physical_cores(
    places: list[tuple[int, int]], allowed: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, places, allowed)
    assert runtime.physical_cores() == cores


@pytest.mark.parametrize(("vendor", "expected"), [("AuthenticAMD", "5"), ("GenuineIntel", None)])
def test_mkl_is_told_to_use_avx2_on_amd_only(
    vendor: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, [(0, 0)], 1, vendor)
    monkeypatch.setattr(runtime, "set_num_threads", lambda count: None)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # so that it is restored in any case
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    runtime.prepare_cpu.__wrapped__()
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == expected


def test_no_threads_at_all() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        runtime.set_num_threads(0)


@pytest.mark.parametrize("chosen", [3, None])
def test_num_threads_begins_with_the_users_choice(chosen: int | None) -> None:
    script = (
        "from ernie45 import runtime; seen = []; before = runtime.num_threads(); "
        "runtime.follow_threads(seen.append); print(before, *seen)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if chosen:
        env["OMP_NUM_THREADS"] = str(chosen)
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(chosen or runtime.physical_cores())] * 2


def test_followers_hear_the_number_now_and_at_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(runtime.paddle.base.core, "set_num_threads", given.append)
    monkeypatch.setattr(runtime, "_threads", 5)
    monkeypatch.setattr(runtime, "_followers", [])
    seen: list[int] = []
    runtime.follow_threads(seen.append)
    runtime.set_num_threads(2)
    assert (seen, given, runtime.num_threads()) == ([5, 2], [2], 2)


FAULTS = """
import resource
import numpy as np
from ernie45 import runtime
runtime.prepare_cpu()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(5 * 2**20, np.float32)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "2"}], ids=["ours", "the user's"])
def test_memory_of_freed_tensors_is_used_again(environment: dict[str, str]) -> None:
    """A second array of 20 MB finds the pages of the first, unless the user has settled how memory is kept."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], env=base | environment, capture_output=True, text=True, check=True
    )
    assert (int(result.stdout) < 100) == (not environment)
