"""Routing tokens to experts and back: the fused operator where there is one, the definition elsewhere.

Everything is computed in float32 and each result is rounded once, to the dtype of the input. The fused operators take
float32 and bfloat16 on the CPU, and float16 as well on a GPU.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from ernie45.ops import custom, gpu, reference
from ernie45.ops.elementwise import fused, narrow, widen


def moe_gate(
    logits: Tensor, bias: Tensor | None, k: int, activation: str, normalise: bool, minimum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses k experts per token. The bias only selects; the weights come from the unbiased probabilities.

    The best expert comes first, of equals the one with the lower index. Gradients flow through the probabilities and
    the weights to the logits, and never to the bias.

    Args:
        logits: [tokens, experts] float32.
        bias: correction bias [experts] float32, or None.
        activation: "softmax" over all experts or "sigmoid".
        normalise: divide the chosen weights by their sum, clipped from below at `minimum`.

    Returns:
        probabilities [tokens, experts], indices [tokens, k] int64, weights [tokens, k], all float32 but the indices.
    """
    if not custom.usable(logits) or logits.dtype != paddle.float32:
        return gpu.best(reference.moe_gate, logits)(logits, bias, k, activation, normalise, minimum)
    shift = None if bias is None else bias.detach()
    probabilities, indices, weights = custom.run(
        "ernie45_moe_gate", logits, shift, k, activation == "softmax", normalise, minimum
    )
    return probabilities, indices.detach(), weights


def moe_permute(x: Tensor, indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies every token to each of its experts: rows sorted by expert, and by token for one expert.

    Args:
        x: [tokens, hidden_size]
        indices: [tokens, k] int64, the experts of each token.

    Returns:
        rows: [tokens * k, hidden_size] in the dtype of x.
        counts: [num_experts] int64, rows of each expert.
        offsets: [num_experts + 1] int64; the rows of expert e are offsets[e] to offsets[e + 1] - 1.
        slots: [tokens, k] int64, the row to which each choice went, for `moe_combine`.
    """
    if not fused(x):
        return gpu.best(reference.moe_permute, x)(x, indices, num_experts)
    rows, counts, offsets, slots = custom.run("ernie45_moe_permute", widen(x), indices, num_experts)
    return narrow(rows, x), counts.detach(), offsets.detach(), slots.detach()


def moe_combine(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum, for every token, of the rows that its experts returned.

    Args:
        rows: [tokens * k, hidden_size], sorted as by `moe_permute`.
        slots: [tokens, k] int64, from `moe_permute`.
        weights: [tokens, k]

    Returns:
        [tokens, hidden_size] in the dtype of rows.
    """
    if not fused(rows):
        return gpu.best(reference.moe_combine, rows)(rows, slots, weights)
    return narrow(custom.run("ernie45_moe_combine", widen(rows), slots, widen(weights))[0], rows)
