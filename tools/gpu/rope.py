"""Cases of rotary positions, forward and backward."""

from __future__ import annotations

import torch

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

ROPE_SHAPES = {
    "21B": {"tokens": TOKENS, "heads": 20, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"},
    "300B": {"tokens": TOKENS, "heads": 64, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"},
}
ROPE_EDGES = every_dtype(
    {"tokens": 0, "heads": 2, "kv_heads": 1, "head_dim": 8},
    {"tokens": 3, "heads": 3, "kv_heads": 1, "head_dim": 6},
    {"tokens": 5, "heads": 20, "kv_heads": 4, "head_dim": 128},
    {"tokens": 2, "heads": 1, "kv_heads": 0, "head_dim": 16, "special": torch.nan},
)
THETA, TIME_PAIRS = 500000.0, 20


def make_rope(generator: torch.Generator, shape: Shape) -> Tensors:
    """q, k [tokens, heads, head_dim]; cos, sin [tokens, head_dim / 2]."""
    tokens, head_dim = shape["tokens"], shape["head_dim"]
    q = normal(generator, tokens, shape["heads"], head_dim, dtype=dtype_of(shape))
    k = normal(generator, tokens, shape["kv_heads"], head_dim, dtype=dtype_of(shape))
    angles = normal(generator, tokens, head_dim // 2)
    return {"q": put_special(q, shape.get("special")), "k": k, "cos": angles.cos(), "sin": angles.sin()}


def rope_case(backward: bool) -> Case:
    """Rotation of q and k, which the kernel also does in place; backward turns the other way."""

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        q, k, tokens = inputs["q"], inputs["k"], shape["tokens"]
        widths = [shape[name] * shape["head_dim"] for name in ("heads", "kv_heads")]
        found = {"q": torch.empty_like(q), "k": torch.empty_like(k)}
        library.call(
            "ernie45_cuda_rope", *(q, widths[0], shape["heads"], k, widths[1], shape["kv_heads"], inputs["cos"]),
            *(inputs["sin"], tokens, tokens, shape["head_dim"], int(backward), tag(q)),
            *(found["q"], widths[0], found["k"], widths[1]),
        )  # fmt: skip
        return found

    def definition(inputs: Tensors, shape: Shape) -> Tensors:
        cos, sin = inputs["cos"].unsqueeze(1), inputs["sin"].unsqueeze(1) * (-1 if backward else 1)
        return {name: turn(inputs[name], cos, sin) for name in ("q", "k")}

    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).reshape(x.shape)

    def count(shape: Shape) -> int:
        values = 2 * (shape["heads"] + shape["kv_heads"]) * dtype_of(shape).itemsize
        return shape["tokens"] * shape["head_dim"] * (values + 4)

    return Case(
        name="rope, gradient" if backward else "rope",
        shapes=ROPE_SHAPES,
        edges=ROPE_EDGES,
        make=make_rope,
        run=run,
        reference=in_float64(definition),
        eager=in_float32(definition),
        bytes=count,
    )


def rope_angles_case(axes: int) -> Case:
    """cos and sin of positions in one or three dimensions."""
    edges = [{"tokens": 0, "head_dim": 128}, {"tokens": 7, "head_dim": 128}, {"tokens": 300, "head_dim": 48}]

    def make(generator: torch.Generator, shape: Shape) -> Tensors:
        size, device = (shape["tokens"], axes), generator.device
        exponents = torch.arange(0, shape["head_dim"], 2, device=device) / shape["head_dim"]
        positions = torch.randint(0, 131072, size, generator=generator, device=device)
        return {"positions": positions, "frequencies": THETA**-exponents}

    def run(library: Library, inputs: Tensors, shape: Shape) -> Tensors:
        tokens, pairs = shape["tokens"], shape["head_dim"] // 2
        found = {name: torch.empty(tokens, pairs, device=inputs["positions"].device) for name in ("cos", "sin")}
        library.call(
            "ernie45_cuda_rope_angles", *(inputs["positions"], axes, inputs["frequencies"], tokens, pairs, TIME_PAIRS),
            *(found["cos"], found["sin"]),
        )  # fmt: skip
        return found

    def definition(inputs: Tensors, shape: Shape) -> Tensors:
        pairs = shape["head_dim"] // 2
        taken = [0 if axes == 1 or pair >= pairs - TIME_PAIRS else 1 + pair % 2 for pair in range(pairs)]
        # The definition rounds the product to float32, which far positions show.
        angles = inputs["positions"][:, taken].float() * inputs["frequencies"].float()
        angles = angles.to(inputs["frequencies"].dtype)
        return {"cos": angles.cos(), "sin": angles.sin()}

    return Case(
        name=f"rope_angles of {axes} position{'s' if axes > 1 else ''}",
        shapes={"21B": {"tokens": 16 * TOKENS, "head_dim": 128}},
        edges=tuple(edges),
        make=make,
        run=run,
        reference=in_float64(definition),
        eager=definition,
        bytes=lambda shape: shape["tokens"] * (8 * axes + 4 * shape["head_dim"]),
        tolerance={"cos": (0, 3e-7), "sin": (0, 3e-7)},
    )


CASES = [
    *(rope_case(backward) for backward in (False, True)),
    *(rope_angles_case(axes) for axes in (1, 3)),
]
