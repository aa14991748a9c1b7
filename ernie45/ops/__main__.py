"""``python -m ernie45.ops``: which implementation each fused operator has here, and why."""

from __future__ import annotations

import re

from ernie45.ops import build, custom, gpu, make, toolchain

PREFIX = "ernie45_"


def main() -> None:
    """Print what tensors on the CPU use, what those on a GPU use, and what the libraries behind them are."""
    rows = [("operator", "implementation", "why"), *((name, *implementation()) for name in operators())]
    _print_columns(rows)
    _print_facts(facts())
    print("\non a GPU")
    if reason := gpu.why_none():
        print(f"none: {reason}")
        return
    _print_columns([rows[0], *gpu.report()])
    _print_facts(library_facts(gpu.loaded()))


def operators() -> list[str]:
    """The forward operators: those of the library, or those that its sources declare where there is none."""
    found = custom.loaded().operators or _declared()
    return sorted(name.removeprefix(PREFIX) for name in found if not name.endswith("_grad"))


def implementation() -> tuple[str, str]:
    """What tensors on the CPU use now, and why."""
    native = custom.library()
    if native is None:
        return "reference", "no library, see below"
    names = {number: name for name, number in custom.INSTRUCTION_SETS.items()}
    used, best = names[native.ernie45_isa()], toolchain.instruction_sets()[0]
    return f"native {used}", "the best that this processor has" if used == best else f"ERNIE45_ISA={used}"


def facts() -> list[tuple[str, str]]:
    """The library's file, how it was built, and its threads."""
    native = custom.library()
    threads = [] if native is None else [("threads", str(native.ernie45_num_threads()))]
    return [*library_facts(custom.loaded()), *threads]


def library_facts(loaded: custom.Loaded) -> list[tuple[str, str]]:
    """A library's file and how it was built, or why there is none."""
    if loaded.file is None:
        return [("library", f"none: {loaded.why_not}")]
    built = make.read_facts(loaded.file)
    return [
        ("library", str(loaded.file)),
        ("compiler", str(built.get("compiler", "unknown"))),
        ("built in", f"{built.get('seconds', '?')} s"),
    ]


def _print_columns(rows: list[tuple[str, str, str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, used, why in rows:
        print(f"{name:{widths[0]}}  {used:{widths[1]}}  {why}")


def _print_facts(pairs: list[tuple[str, str]]) -> None:
    print()
    for label, value in pairs:
        print(f"{label + ':':10}{value}")


def _declared() -> list[str]:
    texts = (path.read_text(encoding="utf-8") for path in (build.SOURCES / "bindings").rglob("*.cpp"))
    return [name for text in texts for name in re.findall(r"^PD_BUILD_OP\((\w+)\)", text, re.MULTILINE)]


if __name__ == "__main__":
    main()
