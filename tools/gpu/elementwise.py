"""Cases of SwiGLU and RMSNorm, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tools.gpu.case import (
    TOKENS,
    Case,
    Shape,
    Tensors,
    dtype_of,
    every_dtype,
    in_float32,
    in_float64,
    normal,
    put_special,
    tag,
)
from tools.gpu.library import Library

EPSILON = 1e-5


def gradients(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad: torch.Tensor) -> tuple:
    """What autograd says."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


# SwiGLU

# Rows that experts compute: of 8192 tokens, six experts for each in the 21B model and eight in the 300B.
SWIGLU_SHAPES = {
    "21B": {"rows": 8192 * 6, "width": 1536, "dtype": "bfloat16"},
    "300B": {"rows": 8192 * 8, "width": 3584, "dtype": "bfloat16"},
}
SWIGLU_EDGES = every_dtype(
    {"rows": 0, "width": 8},
    {"rows": 3, "width": 7},
    {"rows": 5, "width": 1000},
    {"rows": 2, "width": 24, "special": torch.nan},
    {"rows": 2, "width": 24, "special": -200.0},
)
SWIGLU_INFINITE = every_dtype({"rows": 2, "width": 24, "special": torch.inf})


def swiglu(x: torch.Tensor, prob: torch.Tensor | None = None) -> torch.Tensor:
    """The definition: silu(first half) * second half * prob."""
    gate, up = x.chunk(2, dim=-1)
    out = gate / (1 + torch.exp(-gate)) * up
    return out if prob is None else out * prob.unsqueeze(-1)


def swiglu_case(weighted: bool) -> Case:
    """SwiGLU with and without the probability of a row."""

    def make(generator: torch.Generator, shape: Shape) -> Tensors:
        x = normal(generator, shape["rows"], 2 * shape["width"], dtype=dtype_of(shape))
        inputs = {"x": put_special(x, shape.get("special"))}
        if weighted:
            inputs["prob"] = torch.rand(shape["rows"], generator=generator, device=x.device)
        return inputs

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        x, rows, width = inputs["x"], shape["rows"], shape["width"]
        out = x.new_empty(rows, width)
        library.call("ernie45_cuda_swiglu", x, inputs.get("prob"), rows, width, tag(x), out)
        return {"out": out}

    def eager(inputs: Tensors, shape: Shape) -> Tensors:
        gate, up = inputs["x"].chunk(2, dim=-1)
        out = F.silu(gate) * up
        return {"out": out * inputs["prob"].unsqueeze(-1).to(out.dtype) if weighted else out}

    return Case(
        name="swiglu with probability" if weighted else "swiglu",
        shapes=SWIGLU_SHAPES,
        edges=SWIGLU_EDGES + SWIGLU_INFINITE,
        make=make,
        run=run,
        reference=in_float64(lambda inputs, shape: {"out": swiglu(**inputs)}),
        eager=eager,
        bytes=lambda shape: shape["rows"] * (3 * shape["width"] * dtype_of(shape).itemsize + 4 * weighted),
    )


def swiglu_grad_case(weighted: bool) -> Case:
    """The gradients of SwiGLU."""
    forward = swiglu_case(weighted)

    def make(generator: torch.Generator, shape: Shape) -> Tensors:
        inputs = forward.make(generator, shape)
        return {**inputs, "grad": normal(generator, shape["rows"], shape["width"], dtype=dtype_of(shape))}

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        x, prob = inputs["x"], inputs.get("prob")
        found = {"grad_x": torch.empty_like(x)}
        if prob is not None:
            found["grad_prob"] = torch.empty_like(prob)
        library.call(
            "ernie45_cuda_swiglu_grad", *(x, prob, inputs["grad"], shape["rows"], shape["width"], tag(x)),
            *(found["grad_x"], found.get("grad_prob")),
        )  # fmt: skip
        return found

    def reference(inputs: Tensors, shape: Shape) -> Tensors:
        *leaves, grad = inputs.values()
        return dict(zip(("grad_x", "grad_prob"), gradients(swiglu, leaves, grad), strict=False))

    def formula(inputs: Tensors, shape: Shape) -> Tensors:
        (gate, up), grad = inputs["x"].chunk(2, dim=-1), inputs["grad"]
        share = torch.sigmoid(gate)
        silu = gate * share
        scaled = grad * inputs["prob"].unsqueeze(-1) if weighted else grad
        found = {"grad_x": torch.cat([scaled * up * (share + silu * (1 - share)), scaled * silu], dim=-1)}
        if weighted:
            found["grad_prob"] = (grad * silu * up).sum(dim=-1)
        return found

    return Case(
        name=forward.name + ", gradient",
        shapes=SWIGLU_SHAPES,
        edges=SWIGLU_EDGES,
        make=make,
        run=run,
        reference=in_float64(reference),
        eager=in_float32(formula, "grad_prob"),
        bytes=lambda shape: shape["rows"] * (5 * shape["width"] * dtype_of(shape).itemsize + 8 * weighted),
        tolerance={"grad_prob": (1e-5, 1e-4)},  # a sum that may be small beside its terms
    )


# RMSNorm

NORM_SHAPES = {
    "21B": {"rows": TOKENS, "width": 2560, "dtype": "bfloat16"},
    "300B": {"rows": TOKENS, "width": 8192, "dtype": "bfloat16"},
}
NORM_EDGES = every_dtype(
    {"rows": 0, "width": 8},
    {"rows": 1, "width": 1},
    {"rows": 31, "width": 129},
    {"rows": 3, "width": 1032},
    {"rows": 2, "width": 24, "special": 1e4},
    {"rows": 2, "width": 24, "special": torch.nan},
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition: x / sqrt(mean(x ** 2) + epsilon) * weight."""
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * weight


def rms_norm_case(added: bool) -> Case:
    """RMSNorm, alone or of the sum with a residual, which it returns too."""

    def make(generator: torch.Generator, shape: Shape) -> Tensors:
        size, dtype = (shape["rows"], shape["width"]), dtype_of(shape)
        inputs = {"x": put_special(normal(generator, *size, dtype=dtype), shape.get("special"))}
        if added:
            inputs["residual"] = normal(generator, *size, dtype=dtype)
        return {**inputs, "weight": normal(generator, shape["width"], dtype=dtype)}

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        x, weight = inputs["x"], inputs["weight"]
        found = {"out": torch.empty_like(x)}
        if added:
            found["sum"] = torch.empty_like(x)
        library.call(
            "ernie45_cuda_rms_norm", *(x, inputs.get("residual"), weight, EPSILON, shape["rows"], shape["width"]),
            *(tag(x), tag(weight), found["out"], found.get("sum")),
        )  # fmt: skip
        return found

    def definition(inputs: Tensors, shape: Shape) -> Tensors:
        if not added:
            return {"out": rms_norm(**inputs)}
        total = inputs["x"] + inputs["residual"]
        return {"out": rms_norm(total, inputs["weight"]), "sum": total}

    return Case(
        name="rms_norm with residual" if added else "rms_norm",
        shapes=NORM_SHAPES,
        edges=NORM_EDGES,
        make=make,
        run=run,
        reference=in_float64(definition),
        eager=in_float32(definition),
        bytes=lambda shape: ((4 if added else 2) * shape["rows"] + 1) * shape["width"] * dtype_of(shape).itemsize,
    )


def rms_norm_grad_case(added: bool) -> Case:
    """The gradients of RMSNorm; with a residual, added to that of the sum."""

    def make(generator: torch.Generator, shape: Shape) -> Tensors:
        inputs = rms_norm_case(added=False).make(generator, shape)
        size, dtype = (shape["rows"], shape["width"]), dtype_of(shape)
        inputs["grad"] = normal(generator, *size, dtype=dtype)
        return {**inputs, "grad_sum": normal(generator, *size, dtype=dtype)} if added else inputs

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        x, weight, rows, width = inputs["x"], inputs["weight"], shape["rows"], shape["width"]
        count = library.call("ernie45_cuda_rms_norm_grad_parts", rows, width, tag(x))
        parts = torch.empty(count, width, device=x.device)
        found = {"grad_x": torch.empty_like(x), "grad_weight": torch.empty_like(weight)}
        library.call(
            "ernie45_cuda_rms_norm_grad", *(x, weight, inputs["grad"], inputs.get("grad_sum"), EPSILON, rows, width),
            *(tag(x), tag(weight), parts, found["grad_x"], found["grad_weight"]),
        )  # fmt: skip
        return found

    def reference(inputs: Tensors, shape: Shape) -> Tensors:
        grad_x, grad_weight = gradients(rms_norm, [inputs["x"], inputs["weight"]], inputs["grad"])
        return {"grad_x": grad_x + inputs["grad_sum"] if added else grad_x, "grad_weight": grad_weight}

    def formula(inputs: Tensors, shape: Shape) -> Tensors:
        x, grad = inputs["x"], inputs["grad"]
        scale = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPSILON)
        inner = grad * inputs["weight"]
        grad_x = scale * (inner - x * scale.pow(2) * (inner * x).mean(dim=-1, keepdim=True))
        return {
            "grad_x": grad_x + inputs["grad_sum"] if added else grad_x,
            "grad_weight": (grad * x * scale).sum(dim=0),
        }

    return Case(
        name="rms_norm with residual, gradient" if added else "rms_norm, gradient",
        shapes=NORM_SHAPES,
        edges=NORM_EDGES,
        make=make,
        run=run,
        reference=in_float64(reference),
        eager=in_float32(formula),
        bytes=lambda shape: ((4 if added else 3) * shape["rows"] + 2) * shape["width"] * dtype_of(shape).itemsize,
        tolerance={"grad_x": (1e-5, 1e-5), "grad_weight": (1e-5, 5e-4)},  # sums that may be small beside their terms
    )


CASES = [
    *(swiglu_case(weighted) for weighted in (False, True)),
    *(swiglu_grad_case(weighted) for weighted in (False, True)),
    *(rms_norm_case(added) for added in (False, True)),
    *(rms_norm_grad_case(added) for added in (False, True)),
]
