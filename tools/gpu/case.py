"""What ``tools/gpu_check.py`` checks and times: one `Case` per kernel, listed as CASES by each module beside this one.

Everything here runs on PyTorch tensors of any device, so that cases are tried on a CPU with the emulated kernels, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tools.gpu.library import DTYPES, Library

Shape = Mapping[str, Any]  # what the case's own functions read: sizes by name, a dtype as "bfloat16"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        name: of the kernel and variant, such as "swiglu" or "swiglu with probability".
        shapes: by label, what is timed: those of the 21B and the 300B model.
        edges: small shapes that are only checked: odd sizes, no tokens, special values.
        make: (generator, shape) gives the inputs, on the generator's device; optional ones may be absent.
        run: (library, inputs, shape) calls the kernel; gives its outputs by name, which it allocates.
        reference: (inputs, shape) gives the same outputs from the definition in float64, rounded by nobody.
        eager: (inputs, shape) gives the same outputs the way PyTorch code is written, in the dtype of the inputs; what
            is timed for comparison, plain and compiled. None where there is nothing to compare with.
        bytes: (shape) of what the kernel has to read and write, each once.
        tolerance: by output, (relative, absolute) beyond what its dtype rounds; `DEFAULT` for others.
        triton: like `run` without the library, where there is a Triton kernel of the same meaning.
    """

    name: str
    shapes: Mapping[str, Shape]
    edges: tuple[Shape, ...]
    make: Callable[[torch.Generator, Shape], Tensors]
    run: Callable[[Library, Tensors, Shape], Tensors]
    reference: Callable[[Tensors, Shape], Tensors]
    eager: Callable[[Tensors, Shape], Tensors] | None
    bytes: Callable[[Shape], int]
    tolerance: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    triton: Callable[[Tensors, Shape], Tensors] | None = None


TOKENS = 65536  # of what is timed token by token: the smallest tensor then has 300 MB, several times what caches hold
DEFAULT = (1e-5, 1e-6)
# Half of the distance from 1 to the next number: what rounding to a dtype may add, relative to a value.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The smallest steps of a dtype, near zero.
STEP = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def dtype_of(shape: Shape) -> torch.dtype:
    """The torch dtype that the shape names."""
    return getattr(torch, shape["dtype"])


def tag(tensor: torch.Tensor) -> int:
    """The dtype tag of a tensor that our functions take."""
    return DTYPES[str(tensor.dtype).removeprefix("torch.")]


def normal(generator: torch.Generator, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values on the generator's device."""
    return torch.randn(size, generator=generator, device=generator.device).to(dtype)


def put_special(x: torch.Tensor, value: float | None) -> torch.Tensor:
    """x with the value in every third place of its first row, in place; as it is for None."""
    if value is not None and x.numel():
        x.view(-1, x.shape[-1])[0, ::3] = value
    return x


def every_dtype(*shapes: Shape) -> tuple[Shape, ...]:
    """Each shape in every dtype."""
    return tuple({**shape, "dtype": dtype} for shape in shapes for dtype in ("float32", "float16", "bfloat16"))


def in_float64(definition: Callable[[Tensors, Shape], Tensors]) -> Callable[[Tensors, Shape], Tensors]:
    """The definition for inputs that are widened first."""
    return lambda inputs, shape: definition({name: x.double() for name, x in inputs.items()}, shape)


def in_float32(definition: Callable[[Tensors, Shape], Tensors], *wide: str) -> Callable[[Tensors, Shape], Tensors]:
    """The definition as model code has it: in float32, and all outputs but the wide ones then in the inputs' dtype."""

    def eager(inputs: Tensors, shape: Shape) -> Tensors:
        found = definition({name: x.float() for name, x in inputs.items()}, shape)
        return {name: x if name in wide else x.to(dtype_of(shape)) for name, x in found.items()}

    return eager


def worst(case: Case, found: Tensors, expected: Tensors) -> str | None:
    """What is wrong with the outputs of a kernel, by name; None if they agree with the reference.

    Integers have to be equal, and codes of 8 bits, unless there is a tolerance for the numbers that they stand for. NaN
    and infinity have to be where the reference has them, after its rounding to the dtype of the output.
    """
    if found.keys() != expected.keys():
        return f"outputs {sorted(found)}, expected {sorted(expected)}"
    for name, ours in found.items():
        theirs = expected[name]
        if ours.shape != theirs.shape:
            return f"{name} has shape {list(ours.shape)}, expected {list(theirs.shape)}"
        if ours.dtype == torch.float8_e4m3fn and name in case.tolerance:
            ours, theirs = ours.float(), theirs.float()
        if ours.dtype not in ROUNDING:
            differing = int((ours.view(torch.uint8) != theirs.to(ours.dtype).view(torch.uint8)).sum())
            if differing:
                return f"{name} differs in {differing} bytes of {ours.numel() * ours.element_size()}"
            continue
        problem = _worst_float(ours, theirs, *case.tolerance.get(name, DEFAULT))
        if problem:
            return f"{name} {problem}"
    return None


def _worst_float(ours: torch.Tensor, theirs: torch.Tensor, relative: float, absolute: float) -> str | None:
    rounded = theirs.to(ours.dtype)
    special = ~torch.isfinite(rounded)
    same = (ours == rounded) | (torch.isnan(ours) & torch.isnan(rounded))
    if bool((special & ~same).any()):
        return "differs where the reference is NaN or infinite"
    bound = theirs.abs() * (relative + ROUNDING[ours.dtype] * 1.01) + absolute + STEP[ours.dtype]
    excess = torch.where(special, torch.zeros_like(bound), (ours.to(theirs.dtype) - theirs).abs() - bound)
    if excess.numel() and not bool((excess <= 0).all()):
        at = int(torch.where(torch.isnan(excess), torch.inf, excess).argmax())
        return f"is {float(ours.flatten()[at]):.9g} at {at}, expected {float(theirs.flatten()[at]):.9g}"
    return None
