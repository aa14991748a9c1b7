"""Free memory, and words for numbers of bytes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ernie45 import memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    2000000 kB\n"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Files of a pretended system by their path; what is not there does not exist."""
    files: dict[str, str] = {}

    def read(path: Path, encoding: str | None = None) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(memory.Path, "read_text", read)
    return files


def test_available_memory_is_what_the_kernel_says(machine: dict[str, str]) -> None:
    machine["/proc/meminfo"] = MEMINFO
    assert memory.available_bytes() == 2_000_000 * 1024


def test_the_limit_of_a_container_counts_too(machine: dict[str, str]) -> None:
    machine["/proc/meminfo"] = MEMINFO
    machine["/sys/fs/cgroup/memory.max"] = "1000000\n"
    machine["/sys/fs/cgroup/memory.current"] = "400000\n"
    assert memory.available_bytes() == 600_000
    machine["/sys/fs/cgroup/memory.current"] = "1400000\n"
    assert memory.available_bytes() == 0
    machine["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.available_bytes() == 2_000_000 * 1024


@pytest.mark.parametrize("content", [None, "", "MemAvailable: many kB\n"])
def test_unknown_memory_is_none(machine: dict[str, str], content: str | None) -> None:
    if content is not None:
        machine["/proc/meminfo"] = content
    assert memory.available_bytes() is None


def test_this_machine_has_some() -> None:
    total, available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory.available_bytes()
    assert total is None or total > 2**28
    assert available is None or total is None or 0 < available <= total


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_440_000_000, "1.44 GB"),
        (999_600, "1 MB"),
        (843_000_000_000, "843 GB"),
        (1.2e12, "1.2 TB"),
        (3.4e15, "3,400 TB"),
    ],
)
def test_format_bytes(count: float, words: str) -> None:
    assert memory.format_bytes(count) == words


@pytest.mark.parametrize("exponent", range(1, 18))
def test_format_bytes_never_uses_exponents(exponent: int) -> None:
    for digits in (1, 9.994, 9.996, 5.5):
        assert re.fullmatch(r"[\d.,]+ (B|kB|MB|GB|TB)", memory.format_bytes(digits * 10**exponent))
