"""Operators: a functional interface with plain Paddle definitions.

Model code calls these functions and never asks which device it is on. Each definition here is the reference that a
fused operator has to agree with.
"""

from ernie45.ops.reference import (
    attention,
    compute_dtype,
    linear,
    linear_transposed,
    moe_gate,
    rms_norm,
    rope,
    rope_angles,
    swiglu,
)

__all__ = [
    "attention",
    "compute_dtype",
    "linear",
    "linear_transposed",
    "moe_gate",
    "rms_norm",
    "rope",
    "rope_angles",
    "swiglu",
]
