"""Settings of the process that make Paddle use the CPU that it has."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import paddle

# Names and numbers of glibc's malloc.h; 32 MB is the most that it accepts for the first.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**25

_threads: int | None = None  # what set_num_threads was last asked for
_followers: list[Callable[[int], object]] = []


@functools.cache
def prepare_cpu() -> None:
    """Uses all physical cores, MKL's fast kernels on AMD processors, and memory again; the user's settings win.

    Paddle starts with one thread unless OMP_NUM_THREADS says otherwise. The MKL in its wheel takes its slowest path
    on processors that are not Intel's; MKL_DEBUG_CPU_TYPE=5 chooses the AVX2 kernels (read at the first matmul).
    """
    if not _user_chose_threads():
        set_num_threads(physical_cores())
    if "AuthenticAMD" in _read("/proc/cpuinfo"):
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    _keep_freed_memory()


def set_num_threads(count: int) -> None:
    """Sets the number of CPU threads of Paddle's matrix products and of the fused operators."""
    global _threads
    if count < 1:
        raise ValueError(f"set_num_threads: expected at least 1, found {count}")
    paddle.base.core.set_num_threads(count)
    _threads = count
    for follow in _followers:
        follow(count)


def num_threads() -> int:
    """What set_num_threads was last given; before that OMP_NUM_THREADS, or all physical cores without it."""
    if _threads is not None:
        return _threads
    return int(os.environ["OMP_NUM_THREADS"]) if _user_chose_threads() else physical_cores()


def follow_threads(follow: Callable[[int], object]) -> None:
    """Calls ``follow`` with the number of threads, now and whenever it changes.

    The library of fused operators is told in this way once it is loaded; nobody who sets threads has to load it.
    """
    _followers.append(follow)
    follow(num_threads())


def physical_cores() -> int:
    """Cores that this process may use, hardware threads of one core counted once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    packages, cores = [], set()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "physical id":
            packages.append(value.strip())
        elif key.strip() == "core id" and packages:
            cores.add((packages[-1], value.strip()))
    return min(allowed, len(cores) or allowed)


def _keep_freed_memory() -> None:
    """Lets glibc reuse freed tensors of up to 32 MB instead of returning them: a fresh page costs more than filling it.

    Logits are such tensors, and activations while training. The environment's MALLOC_... settings win.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_KEPT)


def _user_chose_threads() -> bool:
    """Paddle itself sets OMP_NUM_THREADS to 1 when it is imported, so a 1 only counts if the process began with it."""
    return os.environ.get("OMP_NUM_THREADS", "1") != "1" or "OMP_NUM_THREADS=" in _read("/proc/self/environ")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
