"""``python -m ernie45.ops``: which implementation each fused operator has here, and why."""

from __future__ import annotations

import re

from ernie45.ops import build, custom, toolchain

PREFIX = "ernie45_"


def main() -> None:
    """Print a table of the operators, and what the library behind them is."""
    rows = [("operator", "implementation", "why"), *((name, *implementation()) for name in operators())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, used, why in rows:
        print(f"{name:{widths[0]}}  {used:{widths[1]}}  {why}")
    print()
    for label, value in facts():
        print(f"{label + ':':10}{value}")


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
    native, file = custom.library(), custom.loaded().file
    if native is None or file is None:
        return [("library", f"none: {custom.loaded().why_not}")]
    built = build.read_facts(file)
    return [
        ("library", str(file)),
        ("compiler", str(built.get("compiler", "unknown"))),
        ("built in", f"{built.get('seconds', '?')} s"),
        ("threads", str(native.ernie45_num_threads())),
    ]


def _declared() -> list[str]:
    texts = (path.read_text(encoding="utf-8") for path in (build.SOURCES / "bindings").rglob("*.cpp"))
    return [name for text in texts for name in re.findall(r"^PD_BUILD_OP\((\w+)\)", text, re.MULTILINE)]


if __name__ == "__main__":
    main()
