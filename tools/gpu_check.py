"""Checks and times the CUDA kernels on a machine with a GPU, nvcc and PyTorch. Paddle and this package are not needed.

    python tools/gpu_check.py                           build, check, sanitize, measure
    python tools/gpu_check.py --output docs/cuda.md     the same, with the table put into that page
    python tools/gpu_check.py --check                   without measuring
    python tools/gpu_check.py --emulated                check the kernels emulated on this CPU (needs the package)

Every kernel is compared with a float64 reference on its edge shapes and on the shapes of the 21B and the 300B model,
then runs on its edge shapes under compute-sanitizer where that is installed. Times are medians of CUDA events around
one call, after the L2 cache was filled with something else. Fails if any kernel is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tools.gpu.case import Case, Shape, Tensors, worst  # noqa: E402
from tools.gpu.library import HEADERS, CudaError, Library  # noqa: E402

FAMILIES = ROOT / "tools" / "gpu"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
BUFFER = 2**30  # bytes that are copied for the bandwidth, and read to empty the L2 cache
REPEATS = 50
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are in microseconds; None where there is nothing to time."""

    kernel: str
    shape: str
    ours: float
    bytes: int
    eager: float | None
    compiled: float | None
    triton: float | None


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; 1 if a kernel is wrong."""
    options = parse(arguments)
    cases = list(chosen_cases(options.only))
    if options.emulated:
        return report_problems(check(cases, emulated(), "cpu", full=False))
    if not torch.cuda.is_available():
        print("no GPU here: --emulated checks the kernels on the CPU", file=sys.stderr)
        return 1
    file = Path(options.library) if options.library else build()
    library = Library([file], stream=torch.cuda.current_stream().cuda_stream)
    failed = report_problems(check(cases, library, "cuda", full=not options.edges))
    if options.edges:
        return failed
    failed |= sanitize(file, options.only)
    if not options.check and not failed:
        page = markdown(measure(cases, library), copy_bandwidth())
        print(page)
        if options.output:
            put_into(Path(options.output), page)
    return failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--check", action="store_true", help="do not measure")
    parser.add_argument("--output", help="a page to put the table into, between its two marks")
    parser.add_argument("--emulated", action="store_true", help="check the kernels emulated on this CPU")
    parser.add_argument("--edges", action="store_true", help="check small shapes and nothing else")
    parser.add_argument("--library", help="the kernels as they were built before")
    return parser.parse_args(arguments)


def chosen_cases(only: str) -> Iterator[Case]:
    """The cases of all families, those with this in their names."""
    for path in sorted(FAMILIES.glob("*.py")):
        if path.stem not in ("case", "library"):
            yield from (case for case in importlib.import_module(f"tools.gpu.{path.stem}").CASES if only in case.name)


# Building


def build() -> Path:
    """The kernels as a shared library with a C interface, for the GPU that is here; kept in build/."""
    sources = sorted(HEADERS.glob("[!.]*.cu"))
    parts = [*sources, *sorted(HEADERS.glob("*.cuh")), *sorted(HEADERS.glob("*.h"))]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in parts)).hexdigest()[:16]
    major, minor = torch.cuda.get_device_capability()
    target = ROOT / "build" / f"gpu_check-{digest}-sm{major}{minor}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        architecture = "90a" if (major, minor) == (9, 0) else f"{major}{minor}"
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            flags = ["-std=c++17", "-O3", "-lineinfo", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
            print(f"building {len(sources)} files for sm_{architecture}", flush=True)
            subprocess.run([find_nvcc(), *flags, code, *map(str, sources), "-o", str(made)], check=True)
            os.replace(made, target)
    return target


def find_nvcc() -> str:
    """nvcc, of $CUDA_HOME, the search path or the usual folder."""
    home = os.environ.get("CUDA_HOME")
    candidates = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        raise SystemExit("no nvcc: install the CUDA toolkit, or name its folder in $CUDA_HOME")
    return found


def emulated() -> Library:
    """The same functions, compiled for the host."""
    from tests.helpers import cuda

    return cuda.library()


# Checking


def check(cases: Iterable[Case], library: Library, device: str, full: bool) -> Iterator[tuple[str, str | None]]:
    """Run every case on its edges and, if `full`, on the shapes that are timed: its name, and what is wrong or None."""
    for case in cases:
        shapes = [*case.edges, *(case.shapes.values() if full else ())]
        for seed, shape in enumerate(shapes):
            generator = torch.Generator(device).manual_seed(seed)
            inputs = case.make(generator, shape)
            untouched = {name: value.clone() for name, value in inputs.items()}
            try:
                problem = worst(case, case.run(library, inputs, shape), case.reference(untouched, shape))
            except CudaError as error:
                problem = str(error)
            yield f"{case.name} {dict(shape)}", problem


def report_problems(checks: Iterable[tuple[str, str | None]]) -> int:
    """Print what is wrong and how much was right; 1 if anything is wrong."""
    right = wrong = 0
    for name, problem in checks:
        right, wrong = right + (problem is None), wrong + (problem is not None)
        if problem is not None:
            print(f"WRONG {name}: {problem}", flush=True)
    print(f"{right} checks passed, {wrong} failed", flush=True)
    return int(wrong > 0)


def sanitize(library: Path, only: str) -> int:
    """Check the edge shapes once more under each tool of compute-sanitizer; 1 if one of them finds something."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not installed: skipped", flush=True)
        return 0
    failed = 0
    # Without its own cache of memory, PyTorch asks CUDA for every tensor, and an access outside of one is noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    check_edges = [sys.executable, __file__, "--edges", "--library", str(library), "--only", only]
    for tool in SANITIZERS:
        # PyTorch asks CUDA for what is not there, and goes on: such errors are none of ours.
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *options, *check_edges]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(f"compute-sanitizer {tool}: {'clean' if result.returncode == 0 else 'FAILED'}", flush=True)
        if result.returncode:
            print(result.stdout[-4000:], result.stderr[-2000:], flush=True)
            failed = 1
    return failed


# Measuring


def measure(cases: Iterable[Case], library: Library, device: str = "cuda") -> Iterator[Row]:
    """Time every kernel, and what PyTorch has for it, on the shapes of the models."""
    for case in cases:
        for label, shape in case.shapes.items():
            inputs = case.make(torch.Generator(device).manual_seed(0), shape)
            yield Row(
                kernel=case.name,
                shape=f"{label}: {describe(shape)}",
                ours=microseconds(lambda case=case, inputs=inputs, shape=shape: case.run(library, inputs, shape)),
                bytes=case.bytes(shape),
                eager=time_peer(case.eager, inputs, shape),
                compiled=time_peer(case.eager and torch.compile(case.eager, dynamic=False), inputs, shape),
                triton=time_peer(case.triton, inputs, shape),
            )
            torch.compiler.reset()


def describe(shape: Shape) -> str:
    """The sizes and the dtype: 49152 x 1536 bfloat16."""
    sizes = " x ".join(str(value) for value in shape.values() if isinstance(value, int) and not isinstance(value, bool))
    words = " ".join(str(value) for value in shape.values() if isinstance(value, str))
    return f"{sizes} {words}".strip()


def time_peer(function: Callable[..., Any] | None, inputs: Tensors, shape: Shape) -> float | None:
    """The time of another implementation; None if there is none or it does not run here."""
    if function is None:
        return None
    try:
        return microseconds(lambda: function(inputs, shape))
    except Exception as error:  # a peer that fails, whatever the reason, is no reason to stop
        print(f"a peer does not run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def microseconds(function: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, with nothing of its tensors in the L2 cache.

    The cache is emptied by reading, which leaves nothing that a measured kernel would have to write back. Reading takes
    so long that the call has been sent to the GPU before it begins there.
    """
    buffer = torch.zeros(BUFFER // 4, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(REPEATS):
        buffer.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written by a copy of 1 GiB, each counted once, in GB/s."""
    source = torch.zeros(BUFFER, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * BUFFER / microseconds(lambda: target.copy_(source)) / 1e3


# The table


def markdown(rows: Iterable[Row], bandwidth: float) -> str:
    """What was measured and on what, as Markdown."""
    head = ["kernel", "shape", "µs", "GB/s", "of copy", "eager µs", "compiled µs", "Triton µs", "faster than compiled"]
    lines = [" | ".join(head), " | ".join(["---", "---", *["---:"] * 7])]
    for row in rows:
        rate = row.bytes / row.ours / 1e3
        gain = f"{row.compiled / row.ours:.1f}x" if row.compiled else ""
        others = ["" if value is None else f"{value:.1f}" for value in (row.eager, row.compiled, row.triton)]
        cells = [row.kernel, row.shape, f"{row.ours:.1f}", f"{rate:.0f}", f"{rate / bandwidth:.2f}", *others, gain]
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{machine()}. A copy of 1 GiB moves {bandwidth:.0f} GB/s.\n\n{table}\n"


def machine() -> str:
    """The GPU and the versions of what was used."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no lines {START} and {END} to put the table between")
    page.write_text(f"{before}{START}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
