"""Cases of FP8 quantisation in both orientations, of stacked weights, behind SwiGLU, and back."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F

from tools.gpu.case import Case, Shape, Tensors, dtype_of, normal, put_special, tag
from tools.gpu.library import Library

TOKENS = 65536  # the smallest tensor that is timed has 300 MB, several times what caches hold
LARGEST = 448.0
CODES = torch.float8_e4m3fn
# Codes that lie one step apart, of normal and of subnormal numbers: for values that exp() has gone into.
ONE_STEP = (2.0**-3, 2.0**-9)


def variants(*shapes: Shape) -> tuple[Shape, ...]:
    """Each shape in the dtypes that are quantised, with both kinds of scales."""
    options = [{"dtype": dtype, "power_of_two": power} for dtype in ("float32", "bfloat16") for power in (False, True)]
    return tuple({**shape, **option} for shape in shapes for option in options)


def blocks(size: int) -> int:
    """Blocks of 128 that cover so much."""
    return -(-size // 128)


# The definition

Block = tuple[int, int]
ROW: Block = (1, 128)
SQUARE: Block = (128, 128)


def in_blocks(x: torch.Tensor, block: Block) -> torch.Tensor:
    """[..., row blocks, block rows, column blocks, 128] of a matrix or several, padded with zeros."""
    rows, columns = x.shape[-2:]
    down, across = -(-rows // block[0]), blocks(columns)
    padded = F.pad(x, (0, across * 128 - columns, 0, down * block[0] - rows))
    return padded.reshape(*x.shape[:-2], down, block[0], across, 128)


def scales_for(largest: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """In float64, which float32 is rounded from as if it had been divided."""
    scales = (largest.double() / LARGEST).clamp(min=2.0**-126)
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    return torch.where(largest > 0, scales, torch.ones_like(scales)).float()


def definition(x: torch.Tensor, block: Block, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of float32 matrices as ernie45.ops.fp8 defines them, bit by bit."""
    parts = in_blocks(x, block)
    finite = torch.where(torch.isfinite(parts), parts.abs(), torch.zeros_like(parts))
    scales = scales_for(finite.amax(dim=(-3, -1)), power_of_two)
    values = parts * (1 / scales.double()).float()[..., :, None, :, None]
    codes = values.clamp(-LARGEST, LARGEST).to(CODES).view(torch.uint8)
    codes = torch.where(torch.isnan(values), torch.full_like(codes, 0x7F), codes)
    whole = codes.reshape(*x.shape[:-2], parts.shape[-4] * block[0], parts.shape[-2] * 128)
    return whole[..., : x.shape[-2], : x.shape[-1]].contiguous().view(CODES), scales


# As PyTorch code is written


def eager_quantize(x: torch.Tensor, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest magnitudes, scales, and a conversion."""
    parts = in_blocks(x, block)
    largest = parts.abs().float().amax(dim=(-3, -1)).clamp(min=1e-4)
    codes = (parts.float() * (LARGEST / largest)[..., :, None, :, None]).to(CODES)
    whole = codes.reshape(*x.shape[:-2], parts.shape[-4] * block[0], parts.shape[-2] * 128)
    return whole[..., : x.shape[-2], : x.shape[-1]].contiguous(), largest / LARGEST


# Quantising

QUANTIZE_SHAPES = {
    "21B": {"rows": TOKENS, "columns": 2560, "dtype": "bfloat16", "power_of_two": False},
    "300B": {"rows": TOKENS, "columns": 8192, "dtype": "bfloat16", "power_of_two": False},
}
QUANTIZE_EDGES = variants(
    {"rows": 0, "columns": 8},
    {"rows": 3, "columns": 7},
    {"rows": 130, "columns": 264},
    {"rows": 16, "columns": 200, "special": torch.nan},
    {"rows": 144, "columns": 128, "special": torch.inf},
    {"rows": 2, "columns": 24, "special": -3e38},
    {"rows": 2, "columns": 24, "special": 1e-39},
    {"rows": 2, "columns": 24, "special": 0.0},
)
STRAIGHT, TRANSPOSED = ("codes", "scales"), ("transposed_codes", "transposed_scales")
BOTH = STRAIGHT + TRANSPOSED


def make_matrix(generator: torch.Generator, shape: Shape) -> Tensors:
    """x [rows, columns]"""
    x = normal(generator, shape["rows"], shape["columns"], dtype=dtype_of(shape))
    return {"x": put_special(x, shape.get("special"))}


def empty_outputs(x: torch.Tensor, block: Block, wanted: tuple[str, ...]) -> Tensors:
    """Codes and scales of a matrix or several, in the orientations that are wanted."""
    *stack, rows, columns = x.shape
    found = {}
    for (codes, scales), down, across in ((STRAIGHT, rows, columns), (TRANSPOSED, columns, rows)):
        if codes in wanted:
            found[codes] = torch.empty(*stack, down, across, dtype=CODES, device=x.device)
            size = (*stack, -(-down // block[0]), blocks(across))
            found[scales] = torch.empty(size, dtype=torch.float32, device=x.device)
    return found


def quantised_bytes(shape: Shape, block: Block, wanted: tuple[str, ...], matrices: int = 1) -> int:
    """Each element read once, each code and scale written once."""
    rows, columns = shape["rows"], shape["columns"]
    straight = rows * columns + 4 * -(-rows // block[0]) * blocks(columns)
    transposed = rows * columns + 4 * -(-columns // block[0]) * blocks(rows)
    written = straight * ("codes" in wanted) + transposed * ("transposed_codes" in wanted)
    return matrices * (rows * columns * dtype_of(shape).itemsize + written)


def both_ways(quantize: Any, x: torch.Tensor, wanted: tuple[str, ...]) -> Tensors:
    """What a function makes of a matrix and of its transpose, as wanted."""
    found = {}
    if "codes" in wanted:
        found["codes"], found["scales"] = quantize(x)
    if "transposed_codes" in wanted:
        found["transposed_codes"], found["transposed_scales"] = quantize(x.transpose(-1, -2).contiguous())
    return found


def quantize_case(name: str, block: Block, wanted: tuple[str, ...]) -> Case:
    """A matrix in some orientations."""

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        x = inputs["x"]
        found = empty_outputs(x, block, wanted)
        arguments = (x, *x.shape, tag(x), block == SQUARE, shape["power_of_two"])
        library.call("ernie45_cuda_fp8_quantize", *arguments, *(found.get(output) for output in BOTH))
        return found

    return Case(
        name=name,
        shapes=QUANTIZE_SHAPES,
        edges=QUANTIZE_EDGES,
        make=make_matrix,
        run=run,
        reference=lambda inputs, shape: both_ways(
            lambda x: definition(x, block, shape["power_of_two"]), inputs["x"].float(), wanted
        ),
        eager=lambda inputs, shape: both_ways(lambda x: eager_quantize(x, block), inputs["x"], wanted),
        bytes=lambda shape: quantised_bytes(shape, block, wanted),
    )


# Weights of experts, [in, out] each: gate and up together

STACK_SHAPES = {
    "21B": {"matrices": 64, "rows": 2560, "columns": 3072, "dtype": "bfloat16", "power_of_two": False},
    "300B": {"matrices": 64, "rows": 8192, "columns": 7168, "dtype": "bfloat16", "power_of_two": False},
}
STACK_EDGES = variants(
    {"matrices": 1, "rows": 3, "columns": 5},
    {"matrices": 3, "rows": 144, "columns": 136},
    {"matrices": 66, "rows": 16, "columns": 8},
)


def make_stack(generator: torch.Generator, shape: Shape) -> Tensors:
    """x [matrices, rows, columns]; each is passed by its own pointer."""
    return {"x": normal(generator, shape["matrices"], shape["rows"], shape["columns"], dtype=dtype_of(shape))}


def run_stack(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """transposed_codes [matrices, columns, rows] and their scales"""
    x = inputs["x"]
    found = empty_outputs(x, SQUARE, TRANSPOSED)
    pointers = (ctypes.c_void_p * len(x))(*[matrix.data_ptr() for matrix in x])
    arguments = (ctypes.addressof(pointers), *x.shape, tag(x), shape["power_of_two"])
    library.call("ernie45_cuda_fp8_quantize_stack", *arguments, *(found.get(output) for output in BOTH))
    return found


def eager_stack(inputs: Tensors, shape: Shape) -> Tensors:
    """Weights are parameters of their own in a model, and so are stacked first."""
    return both_ways(lambda x: eager_quantize(x, SQUARE), torch.stack(inputs["x"].unbind()), TRANSPOSED)


# Back


def make_codes(generator: torch.Generator, shape: Shape) -> Tensors:
    """codes [rows, columns], every one of 256, and scales [rows, blocks]"""
    rows, columns = shape["rows"], shape["columns"]
    codes = torch.randint(0, 256, (rows, columns), generator=generator, device=generator.device, dtype=torch.uint8)
    scales = torch.exp2(4 * normal(generator, rows, blocks(columns)))
    return {"codes": codes.view(CODES), "scales": put_special(scales, shape.get("special"))}


def run_dequantize(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """out [rows, columns]"""
    codes = inputs["codes"]
    out = torch.empty(codes.shape, dtype=dtype_of(shape), device=codes.device)
    arguments = (codes, inputs["scales"], *codes.shape, False, tag(out), out)
    library.call("ernie45_cuda_fp8_dequantize", *arguments)
    return {"out": out}


def spread(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """A scale for each element."""
    return scales.repeat_interleave(128, dim=1)[:, :columns]


def dequantized(inputs: Tensors, shape: Shape) -> Tensors:
    """The definition: a product in float32."""
    return {"out": inputs["codes"].float() * spread(inputs["scales"], shape["columns"])}


def eager_dequantize(inputs: Tensors, shape: Shape) -> Tensors:
    """The same, rounded."""
    return {"out": dequantized(inputs, shape)["out"].to(dtype_of(shape))}


# SwiGLU. Rows that experts compute: of 8192 tokens, six experts for each in the 21B model and eight in the 300B.

SWIGLU_SHAPES = {
    "21B": {"rows": 8192 * 6, "width": 1536, "dtype": "bfloat16", "power_of_two": False},
    "300B": {"rows": 8192 * 8, "width": 3584, "dtype": "bfloat16", "power_of_two": False},
}
SWIGLU_EDGES = variants(
    {"rows": 0, "width": 8},
    {"rows": 3, "width": 7},
    {"rows": 5, "width": 1000},
    {"rows": 3, "width": 256, "special": torch.nan},
    {"rows": 3, "width": 136, "special": -80.0},
)


def make_swiglu(generator: torch.Generator, shape: Shape) -> Tensors:
    """x [rows, 2 * width], prob [rows]"""
    x = normal(generator, shape["rows"], 2 * shape["width"], dtype=dtype_of(shape))
    prob = torch.rand(shape["rows"], generator=generator, device=generator.device)
    return {"x": put_special(x, shape.get("special")), "prob": prob}


def run_swiglu(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """codes [rows, width], scales [rows, blocks]"""
    x, rows, width = inputs["x"], shape["rows"], shape["width"]
    found = {
        "codes": torch.empty(rows, width, dtype=CODES, device=x.device),
        "scales": torch.empty(rows, blocks(width), device=x.device),
    }
    arguments = (x, inputs["prob"], rows, width, tag(x), shape["power_of_two"], *found.values())
    library.call("ernie45_cuda_swiglu_fp8_quantize", *arguments)
    return found


def swiglu(x: torch.Tensor, prob: torch.Tensor) -> torch.Tensor:
    """The definition: silu(first half) * second half * prob."""
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up * prob.unsqueeze(-1)


def swiglu_reference(inputs: Tensors, shape: Shape) -> Tensors:
    """In float64 until it is quantised."""
    out = swiglu(inputs["x"].double(), inputs["prob"].double()).float()
    codes, scales = definition(out, ROW, shape["power_of_two"])
    return {"codes": codes, "scales": scales}


def eager_swiglu(inputs: Tensors, shape: Shape) -> Tensors:
    """The sequence that the kernel replaces."""
    gate, up = inputs["x"].chunk(2, dim=-1)
    out = F.silu(gate) * up * inputs["prob"].unsqueeze(-1).to(gate.dtype)
    codes, scales = eager_quantize(out, ROW)
    return {"codes": codes, "scales": scales}


BACKWARD_EDGES = variants({"rows": 0, "width": 128}, {"rows": 3, "width": 128}, {"rows": 2, "width": 2304})


def make_swiglu_backward(generator: torch.Generator, shape: Shape) -> Tensors:
    """x, prob, grad [rows, width]"""
    grad = normal(generator, shape["rows"], shape["width"], dtype=dtype_of(shape))
    return {**make_swiglu(generator, shape), "grad": grad}


def run_swiglu_backward(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
    """grad_x and its codes and scales, grad_prob, and the output once more"""
    x, prob, rows, width = inputs["x"], inputs["prob"], shape["rows"], shape["width"]
    found = {
        "grad_x": torch.empty_like(x),
        "codes": torch.empty(rows, 2 * width, dtype=CODES, device=x.device),
        "scales": torch.empty(rows, blocks(2 * width), device=x.device),
        "grad_prob": torch.empty_like(prob),
        "out": x.new_empty(rows, width),
    }
    arguments = (x, prob, inputs["grad"], rows, width, tag(x), shape["power_of_two"], *found.values())
    library.call("ernie45_cuda_swiglu_fp8_quantize_backward", *arguments)
    return found


def swiglu_gradients(x: torch.Tensor, prob: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """In the dtype of the arguments."""
    gate, up = x.chunk(2, dim=-1)
    share, scaled = torch.sigmoid(gate), grad * prob.unsqueeze(-1)
    silu = gate * share
    product = silu * up
    grad_x = torch.cat([scaled * up * (share + silu * (1 - share)), scaled * silu], dim=-1)
    return {"grad_x": grad_x, "grad_prob": (grad * product).sum(dim=-1), "out": product * prob.unsqueeze(-1)}


def swiglu_backward_reference(inputs: Tensors, shape: Shape) -> Tensors:
    """In float64; codes are those of the rounded gradient."""
    found = swiglu_gradients(*(inputs[name].double() for name in ("x", "prob", "grad")))
    rounded = found["grad_x"].to(dtype_of(shape)).float()
    found["codes"], found["scales"] = definition(rounded, ROW, shape["power_of_two"])
    return found


def eager_swiglu_backward(inputs: Tensors, shape: Shape) -> Tensors:
    """The sequence that the kernel replaces."""
    found = swiglu_gradients(*(inputs[name].float() for name in ("x", "prob", "grad")))
    found.update({name: found[name].to(dtype_of(shape)) for name in ("grad_x", "out")})
    found["codes"], found["scales"] = eager_quantize(found["grad_x"], ROW)
    return found


def swiglu_backward_bytes(shape: Shape) -> int:
    """x, grad, grad_x and out; codes; prob, its gradient, and scales."""
    elements = shape["rows"] * shape["width"]
    return elements * (6 * dtype_of(shape).itemsize + 2) + 4 * shape["rows"] * (2 + blocks(2 * shape["width"]))


CASES = [
    quantize_case("fp8_quantize 1x128", ROW, STRAIGHT),
    quantize_case("fp8_quantize 1x128 transposed", ROW, TRANSPOSED),
    quantize_case("fp8_quantize 1x128 both", ROW, BOTH),
    quantize_case("fp8_quantize 128x128", SQUARE, STRAIGHT),
    quantize_case("fp8_quantize 128x128 both", SQUARE, BOTH),
    Case(
        name="fp8_quantize stack transposed",
        shapes=STACK_SHAPES,
        edges=STACK_EDGES,
        make=make_stack,
        run=run_stack,
        reference=lambda inputs, shape: both_ways(
            lambda x: definition(x, SQUARE, shape["power_of_two"]), inputs["x"].float(), TRANSPOSED
        ),
        eager=eager_stack,
        bytes=lambda shape: quantised_bytes(shape, SQUARE, TRANSPOSED, shape["matrices"]),
    ),
    Case(
        name="fp8_dequantize 1x128",
        shapes=QUANTIZE_SHAPES,
        edges=QUANTIZE_EDGES,
        make=make_codes,
        run=run_dequantize,
        reference=dequantized,
        eager=eager_dequantize,
        bytes=lambda shape: quantised_bytes(shape, ROW, STRAIGHT),
    ),
    Case(
        name="swiglu_fp8_quantize",
        shapes=SWIGLU_SHAPES,
        edges=SWIGLU_EDGES,
        make=make_swiglu,
        run=run_swiglu,
        reference=swiglu_reference,
        eager=eager_swiglu,
        bytes=lambda shape: (
            shape["rows"] * (shape["width"] * (2 * dtype_of(shape).itemsize + 1) + 4 * (1 + blocks(shape["width"])))
        ),
        tolerance={"codes": ONE_STEP, "scales": (2e-5, 0.0)},
    ),
    Case(
        name="swiglu_fp8_quantize backward",
        shapes=SWIGLU_SHAPES,
        edges=BACKWARD_EDGES,
        make=make_swiglu_backward,
        run=run_swiglu_backward,
        reference=swiglu_backward_reference,
        eager=eager_swiglu_backward,
        bytes=swiglu_backward_bytes,
        tolerance={"codes": ONE_STEP, "scales": (2.0**-7, 0.0), "grad_prob": (1e-4, 1e-3), "grad_x": (2e-5, 1e-5)},
    ),
]
