"""What computes an operator on a GPU: our CUDA operator, else a fused operator of Paddle's own, else the definition.

The CUDA operators are loaded, and if need be built, when the first tensor on a GPU arrives. They take float32, float16
and bfloat16 (FP8: float32 and bfloat16), compute in float32 and round once, as the definitions do. Paddle's fused
operators stand in for them where they cannot be built. These mean the same, with more roundings: `fused_rms_norm_ext`
rounds before it multiplies with the weight, `fused_rotary_position_embedding` rounds cos and sin to the dtype of x.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import paddle
import paddle.incubate.nn.functional as fused
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.ops import build_cuda, custom, fp8_reference, reference

Function = TypeVar("Function", bound=Callable[..., Any])

FLOATS = (paddle.float32, paddle.float16, paddle.bfloat16)
QUANTISED = (paddle.float32, paddle.bfloat16)  # to FP8
# What the kernels take at most; definitions do the rest.
WIDEST_NORM = 8192
MOST_EXPERTS, MOST_CHOICES, MOST_SORTED = 256, 32, 1024

_loaded: custom.Loaded | None = None
_load_lock = threading.Lock()
# Without CUDA no tensor is on a GPU, and none has to be asked.
_has_cuda: bool = paddle.is_compiled_with_cuda()


@dataclass(frozen=True)
class Implementation:
    """What computes an operator on a GPU. Both functions take the arguments of the definition.

    Attributes:
        operator: the CUDA operator, without "ernie45_cuda_".
        native: calls it.
        dtypes: of the first argument that it takes.
        stand_in: the same with a fused operator of Paddle's own, if there is one of this meaning.
        stand_in_name: of that operator.
    """

    operator: str
    native: Callable[..., Any]
    dtypes: tuple[paddle.dtype, ...] = FLOATS
    stand_in: Callable[..., Any] | None = None
    stand_in_name: str = ""


def best(definition: Function, x: Tensor) -> Function:
    """What computes the same as this definition does, for a first argument like x: on its device, of its dtype."""
    if not on_gpu(x) or custom.wants_reference():
        return definition
    implementation = IMPLEMENTATIONS[definition]
    if x.dtype in implementation.dtypes and loaded().file is not None:
        return cast(Function, implementation.native)
    return cast(Function, implementation.stand_in or definition)


def on_gpu(x: Tensor) -> bool:
    """Whether this is a tensor with numbers on a GPU."""
    return _has_cuda and isinstance(x, Tensor) and x.place.is_gpu_place()


def loaded() -> custom.Loaded:
    """The library of the CUDA operators, built and loaded at the first call, or why there is none."""
    global _loaded
    if _loaded is None:
        with _load_lock:
            if _loaded is None:
                _loaded = custom.load("CUDA operators", build_cuda.library_file)
    return _loaded


def why_none() -> str:
    """Why no tensor can be on a GPU; empty if one can."""
    if not _has_cuda:
        return "this Paddle was compiled without CUDA; paddlepaddle-gpu, from Paddle's own index, is"
    return "" if paddle.device.cuda.device_count() else "there is no GPU here"


def report() -> list[tuple[str, str, str]]:
    """For each operator its name, what tensors on a GPU use, and why."""
    if custom.wants_reference():
        return [(entry.operator, "reference", "ERNIE45_OPS=reference") for entry in IMPLEMENTATIONS.values()]
    if loaded().file is not None:
        return [(entry.operator, "native CUDA", "it could be built") for entry in IMPLEMENTATIONS.values()]
    return [
        (entry.operator, f"Paddle's {entry.stand_in_name}", "no library, see below")
        if entry.stand_in
        else (entry.operator, "reference", "no library, see below, and none of Paddle's means the same")
        for entry in IMPLEMENTATIONS.values()
    ]


def _run(operator: str, *arguments: Any) -> list[Tensor]:
    return custom.run(f"ernie45_cuda_{operator}", *arguments)


# RMSNorm, SwiGLU, rotary positions


def _rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    if x.shape[-1] > WIDEST_NORM or x.shape[-1] == 0:
        return reference.rms_norm(x, weight, epsilon, residual)
    weight = weight if weight.dtype in (x.dtype, paddle.float32) else weight.astype("float32")
    if residual is None:
        return _run("rms_norm", x, weight, epsilon)[0]
    out, total = _run("add_rms_norm", x, residual.astype(x.dtype), weight, epsilon)
    return out, total


def _paddle_rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    takes = x.dtype in (paddle.float32, paddle.bfloat16) and weight.dtype == x.dtype
    if residual is not None or not takes:
        return reference.rms_norm(x, weight, epsilon, residual)
    return fused.fused_rms_norm_ext(x, weight, epsilon)[0]


def _swiglu(x: Tensor, prob: Tensor | None = None) -> Tensor:
    if prob is None:
        return _run("swiglu", x)[0]
    return _run("swiglu_prob", x, prob.astype("float32"))[0]


def _paddle_swiglu(x: Tensor, prob: Tensor | None = None) -> Tensor:
    return F.swiglu(x) if prob is None else reference.swiglu(x, prob)


def _rope_angles(positions: Tensor, head_dim: int, theta: float, time_pairs: int = 0) -> tuple[Tensor, Tensor]:
    reference.check_positions(positions, head_dim // 2, time_pairs)
    frequencies = reference.rope_frequencies(head_dim, theta)
    cos, sin = _run("rope_angles", positions, frequencies.to(positions.place), time_pairs)
    return cos, sin


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _run("rope", x, cos, sin)[0]


def _paddle_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Paddle's takes one row of angles for each position, twice as wide, and for each token the number of its row."""
    batch, sequence, _, head_dim = x.shape
    rows = cos.shape[0] * sequence
    wide = [t.repeat_interleave(2, axis=-1).reshape([1, rows, 1, head_dim]).astype(x.dtype) for t in (sin, cos)]
    places = paddle.arange(rows).reshape([-1, sequence]).expand([batch, sequence])
    return fused.fused_rotary_position_embedding(
        x, sin=wide[0], cos=wide[1], position_ids=places, use_neox_rotary_style=True
    )[0]


# Mixture of experts


def _moe_gate(
    logits: Tensor, bias: Tensor | None, k: int, activation: str, normalise: bool, minimum: float
) -> tuple[Tensor, Tensor, Tensor]:
    if logits.shape[-1] > MOST_EXPERTS or k > MOST_CHOICES:
        return reference.moe_gate(logits, bias, k, activation, normalise, minimum)
    shift = None if bias is None else bias.detach()
    probabilities, indices, weights = _run("moe_gate", logits, shift, k, activation == "softmax", normalise, minimum)
    return probabilities, indices.detach(), weights


def _moe_permute(x: Tensor, indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if num_experts > MOST_SORTED or indices.shape[-1] > MOST_CHOICES:
        return reference.moe_permute(x, indices, num_experts)
    rows, counts, offsets, slots = _run("moe_permute", x, indices, num_experts, 1)
    return rows, counts.detach(), offsets.detach(), slots.detach()


def _moe_combine(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    if slots.shape[-1] > MOST_CHOICES:
        return reference.moe_combine(rows, slots, weights)
    return _run("moe_combine", rows, slots, weights)[0]


# FP8


def _quantisation(operator: str) -> Implementation:
    def quantize(x: Tensor, block: tuple[int, int], scale: str) -> tuple[Tensor, ...]:
        return tuple(_run(operator, x, block[0], scale == "power_of_two"))

    return Implementation(operator, quantize, QUANTISED)


def _dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: str) -> Tensor:
    return _run("fp8_dequantize", codes, scales, block[0], dtype == "bfloat16")[0]


def _swiglu_quantize(x: Tensor, prob: Tensor | None, scale: str) -> tuple[Tensor, Tensor]:
    factors = None if prob is None else prob.astype("float32")
    codes, scales = _run("swiglu_fp8_quantize", x, factors, scale == "power_of_two")
    return codes, scales


def _quantize_stack(weights: Sequence[Tensor], scale: str) -> tuple[Tensor, ...]:
    return tuple(_run("fp8_quantize_stack", list(weights), scale == "power_of_two"))


def _swiglu_quantize_backward(x: Tensor, grad: Tensor, prob: Tensor | None, scale: str) -> tuple[Tensor, ...]:
    factors = None if prob is None else prob.astype("float32")
    return tuple(_run("swiglu_fp8_quantize_backward", x, factors, grad, True, scale == "power_of_two"))


IMPLEMENTATIONS: dict[Callable[..., Any], Implementation] = {
    reference.rms_norm: Implementation("rms_norm", _rms_norm, FLOATS, _paddle_rms_norm, "fused_rms_norm_ext"),
    reference.swiglu: Implementation("swiglu", _swiglu, FLOATS, _paddle_swiglu, "swiglu"),
    reference.rope_angles: Implementation("rope_angles", _rope_angles, (paddle.int64,)),
    reference.rope: Implementation(
        "rope", _rope, stand_in=_paddle_rope, stand_in_name="fused_rotary_position_embedding"
    ),
    reference.moe_gate: Implementation("moe_gate", _moe_gate, (paddle.float32,)),
    reference.moe_permute: Implementation("moe_permute", _moe_permute),
    reference.moe_combine: Implementation("moe_combine", _moe_combine),
    fp8_reference.quantize: _quantisation("fp8_quantize"),
    fp8_reference.quantize_transposed: _quantisation("fp8_quantize_transposed"),
    fp8_reference.quantize_both: _quantisation("fp8_quantize_both"),
    fp8_reference.dequantize: Implementation("fp8_dequantize", _dequantize, (paddle.float8_e4m3fn,)),
    fp8_reference.quantize_stack: Implementation("fp8_quantize_stack", _quantize_stack, QUANTISED),
    fp8_reference.swiglu_quantize: Implementation("swiglu_fp8_quantize", _swiglu_quantize, QUANTISED),
    fp8_reference.swiglu_quantize_backward: Implementation(
        "swiglu_fp8_quantize_backward", _swiglu_quantize_backward, QUANTISED
    ),
}
