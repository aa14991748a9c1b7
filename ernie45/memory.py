"""How much memory this machine has, and words for numbers of bytes."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, within the control group's limit; None where it is unknown."""
    candidates = [_from_meminfo("MemAvailable"), _from_control_group()]
    known = [value for value in candidates if value is not None]
    return min(known) if known else None


def format_bytes(count: float) -> str:
    """For example "1.44 GB": decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def _from_meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _from_control_group() -> int | None:
    """What is left of a container's limit (control groups version 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text(), (root / "memory.current").read_text()
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
