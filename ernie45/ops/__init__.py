"""Operators: a functional interface with plain Paddle definitions.

Model code calls these functions and never asks which device it is on. Each has a definition in plain Paddle, with which
the fused operator that runs in its place, where there is one, has to agree.
"""

from ernie45.ops.adamw import AdamWStep, adamw_update, sum_of_squares
from ernie45.ops.attention import decode_attention
from ernie45.ops.causal_attention import causal_attention
from ernie45.ops.decoder import decoder
from ernie45.ops.elementwise import rms_norm, rope, rope_angles, swiglu
from ernie45.ops.fp8 import (
    SwigluGradients,
    fp8_dequantize,
    fp8_quantize,
    fp8_quantize_both,
    fp8_quantize_stack,
    fp8_quantize_transposed,
    swiglu_fp8_quantize,
    swiglu_fp8_quantize_backward,
)
from ernie45.ops.fp8_matmul import fp8_expert_linear, fp8_linear
from ernie45.ops.linear import (
    AdaptedWeight,
    embedding,
    expert_linear,
    linear,
    linear_transposed,
    rounds_activations,
    unstack,
)
from ernie45.ops.moe import moe_combine, moe_gate, moe_permute
from ernie45.ops.packed import PackedWeight
from ernie45.ops.reference import (
    attention,
    attention_by_frame,
    compute_dtype,
    layer_norm,
    quick_gelu,
    rope_halves,
)

__all__ = [
    "AdamWStep",
    "AdaptedWeight",
    "PackedWeight",
    "SwigluGradients",
    "adamw_update",
    "attention",
    "attention_by_frame",
    "causal_attention",
    "compute_dtype",
    "decode_attention",
    "decoder",
    "embedding",
    "expert_linear",
    "fp8_dequantize",
    "fp8_expert_linear",
    "fp8_linear",
    "fp8_quantize",
    "fp8_quantize_both",
    "fp8_quantize_stack",
    "fp8_quantize_transposed",
    "layer_norm",
    "linear",
    "linear_transposed",
    "moe_combine",
    "moe_gate",
    "moe_permute",
    "quick_gelu",
    "rms_norm",
    "rope",
    "rope_angles",
    "rope_halves",
    "rounds_activations",
    "sum_of_squares",
    "swiglu",
    "swiglu_fp8_quantize",
    "swiglu_fp8_quantize_backward",
    "unstack",
]
